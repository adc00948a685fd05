// Package memstat measures what VMs hold of the host's memory, as
// /proc/PID/smaps counts it, and adds it up without counting a shared page
// twice.
//
// Words are those of smaps (proc_pid_smaps(5)): RSS is what a process has
// mapped, shared or not; PSS divides each page by the number of processes that
// map it; a private page is mapped by this process alone. A page that a clone
// copied is private; one that it reads from its template is shared as soon as
// a second clone reads it. Anonymous pages are those that only this VM can ever
// use: written by it, or copied for it.
package memstat

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"fcvm/internal/vmm"
)

// Usage is what one VMM process holds. All sizes are in bytes, and those
// without "Overhead" are of guest memory alone.
type Usage struct {
	RSS     int64
	PSS     int64
	Private int64
	Shared  int64
	// Anon is the resident anonymous part of RSS, AnonPSS that of PSS: less than
	// Anon only where KSM merged pages.
	Anon, AnonPSS int64
	// FilePSS is the part of PSS that a template or memory file backs.
	FilePSS int64
	// Swap is what was swapped out. It is in none of the above.
	Swap int64
	// OverheadRSS and OverheadPSS are of everything else in the process.
	OverheadRSS, OverheadPSS int64
}

// Process measures the process pid, whose guest memory is at regions. It reads
// smaps once: about 1 ms for a VMM. The error wraps fs.ErrNotExist or ESRCH
// when the process has ended.
func Process(pid int, regions []vmm.Region) (Usage, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		return Usage{}, fmt.Errorf("measure memory of process %d: %w", pid, err)
	}
	defer f.Close()
	u, err := Parse(f, regions)
	if err != nil {
		return Usage{}, fmt.Errorf("measure memory of process %d: %w", pid, err)
	}
	return u, nil
}

// Resident is what of a template (a memfd or tmpfs file) is in memory or swap,
// in bytes.
func Resident(f *os.File) (int64, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return 0, fmt.Errorf("measure template: %w", err)
	}
	return st.Blocks * 512, nil // stat(2): units of 512 bytes
}

// VM is one VM for Total.
type VM struct {
	Usage
	// Template names what backs the file part of the guest's memory: one string
	// for all VMs of one template or memory file. Empty for a VM that is no clone.
	Template string
	// MemoryBytes is the guest's size.
	MemoryBytes int64
	// Spare marks a VMM that was started ahead: what it holds is held, but it is
	// none of the VMs that would hold more if nothing were shared.
	Spare bool
}

// Totals sums up VMs. All sizes are in bytes, of guest memory but for Overhead.
type Totals struct {
	// Unshared is what the VMs would hold if nothing were shared: the sum of RSS.
	Unshared int64
	// Held is what they hold, each template once and whole, also where no VM maps
	// all of it now.
	Held int64
	// Overhead is the PSS of the VMMs apart from guest memory.
	Overhead int64
	// Memory is the sum of the guests' sizes.
	Memory int64
}

// SavedPercent is 100 × (1 − Held/Unshared), or 0 where nothing is held. It is
// negative while a template holds more than its clones have read of it.
func (t Totals) SavedPercent() float64 {
	if t.Unshared == 0 {
		return 0
	}
	return 100 * (1 - float64(t.Held)/float64(t.Unshared))
}

// Total adds up VMs. templates has what is resident of each template; a memory
// file is not in it, because the page cache keeps of it what it likes, whether
// VMs run or not, and so only counts what VMs map.
func Total(vms []VM, templates map[string]int64) Totals {
	var t Totals
	file := map[string]int64{}
	for _, v := range vms {
		if !v.Spare {
			t.Unshared += v.RSS
			t.Memory += v.MemoryBytes
		}
		t.Held += v.AnonPSS
		t.Overhead += v.OverheadPSS
		file[v.Template] += v.FilePSS
	}
	// A template counts even when none of its clones is among vms: it is held.
	for name, resident := range templates {
		file[name] = max(file[name], resident)
	}
	for _, n := range file {
		t.Held += n
	}
	return t
}
