//go:build linux && amd64

package doctor

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"fcvm/internal/uffd"
	"fcvm/internal/vmm/hugepages"
)

// dirOf is the directory of a program, links followed, as fcvm looks for its
// companions.
func dirOf(exe string) string {
	if real, err := filepath.EvalSymlinks(exe); err == nil {
		exe = real
	}
	return filepath.Dir(exe)
}

// minKernel has all that fcvm cannot do without: pidfd_getfd (5.6) and user
// faults from within the kernel by the sysctl of 5.11.
var minKernel = [2]int{5, 11}

func (h *host) checkKernel(context.Context) Check {
	rel := h.release()
	major, minor, ok := parseRelease(rel)
	c := Check{Name: "kernel", Status: OK, Detail: "Linux " + rel}
	less := func(v [2]int) bool { return major < v[0] || major == v[0] && minor < v[1] }
	switch {
	case !ok:
		c.Status, c.Detail = Warn, fmt.Sprintf("cannot tell the kernel's version from %q; fcvm needs Linux 5.11", rel)
	case less(minKernel):
		c.Status, c.Detail = Fail, fmt.Sprintf("Linux %s is too old: fcvm needs 5.11, better 6.7", rel)
		c.Fix = []string{"# install a newer kernel: Debian 12 has 6.1, its backports newer ones"}
	case less([2]int{6, 1}):
		c.Detail += "; since 6.1 /dev/userfaultfd can be granted to a user"
	case less([2]int{6, 7}):
		c.Detail += "; since 6.7 (PAGEMAP_SCAN) snapshots pause a VM for less"
	}
	return c
}

// parseRelease takes the first two numbers of "6.1.0-18-amd64".
func parseRelease(s string) (major, minor int, ok bool) {
	a, rest, ok := strings.Cut(s, ".")
	if !ok {
		return 0, 0, false
	}
	end := strings.IndexFunc(rest, func(r rune) bool { return r < '0' || r > '9' })
	if end < 0 {
		end = len(rest)
	}
	major, err1 := strconv.Atoi(a)
	minor, err2 := strconv.Atoi(rest[:end])
	return major, minor, err1 == nil && err2 == nil
}

func (h *host) checkUserfaultfd(context.Context) Check {
	c := Check{Name: "userfaultfd", Status: OK}
	device := filepath.Join(h.root, uffd.Device)
	err := h.uffd()
	switch {
	case err == nil:
		c.Detail = "allowed: clones load lazily and share memory"
	case errors.Is(err, unix.ENOSYS):
		c.Status, c.Detail = Warn, "this kernel has no userfaultfd: clones need --mem-backend file"
		c.Fix = []string{"# boot a kernel with CONFIG_USERFAULTFD=y, as distributions build it"}
	case exists(device):
		c.Status, c.Detail = Warn, fmt.Sprintf("%s may not open %s: clones need --mem-backend file", h.user, uffd.Device)
		c.Fix = []string{
			"sudo groupadd --system --force uffd",
			"sudo usermod -aG uffd " + h.user,
			`echo 'KERNEL=="userfaultfd", GROUP="uffd", MODE="0660"' | sudo tee /etc/udev/rules.d/60-userfaultfd.rules`,
			"sudo udevadm control --reload && sudo udevadm trigger --sysname-match=userfaultfd  # then log in anew",
			fmt.Sprintf("sudo setfacl -m u:%s:rw %s  # or: at once, until the next boot", h.user, uffd.Device),
		}
	default:
		c.Status, c.Detail = Warn, fmt.Sprintf("%s may not use userfaultfd: clones need --mem-backend file", h.user)
		c.Fix = []string{
			"# in a container: start it with --device " + uffd.Device,
			"sudo sysctl -w vm.unprivileged_userfaultfd=1  # else: for every user, until the next boot",
			"echo vm.unprivileged_userfaultfd=1 | sudo tee /etc/sysctl.d/60-userfaultfd.conf  # and after it",
		}
	}
	return c
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func (h *host) checkPtrace(context.Context) Check {
	c := Check{Name: "ptrace", Status: OK, Detail: "allowed: userfaultfd can be attached to QEMU, and snapshots read its memory"}
	err := h.attach()
	if err == nil {
		return c
	}
	c.Status, c.Detail = Warn, err.Error()+": clones fall back to --mem-backend file"
	if scope, ok := h.number("proc/sys/kernel/yama/ptrace_scope"); ok && scope >= 2 {
		c.Fix = []string{
			"sudo sysctl -w kernel.yama.ptrace_scope=1  # 3 can only be left by a boot",
			"echo kernel.yama.ptrace_scope=1 | sudo tee /etc/sysctl.d/60-ptrace.conf",
		}
	} else {
		c.Fix = []string{"# in a container: start it with --cap-add SYS_PTRACE --security-opt seccomp=unconfined"}
	}
	return c
}

// checkYama: with ptrace_scope 1 only ancestors may read a process's memory, and
// a supervisor that was restarted is no ancestor of the VMs that it adopts.
func (h *host) checkYama(context.Context) Check {
	c := Check{Name: "yama", Status: OK, Detail: "does not keep a restarted supervisor from snapshotting running VMs"}
	scope, ok := h.number("proc/sys/kernel/yama/ptrace_scope")
	if !ok || scope == 0 || h.tracer {
		return c
	}
	c.Status = Warn
	c.Detail = fmt.Sprintf("kernel.yama.ptrace_scope is %d: VMs that outlived a supervisor cannot be snapshotted", scope)
	c.Fix = []string{"sudo sysctl -w kernel.yama.ptrace_scope=0"}
	return c
}

func (h *host) checkKSM(context.Context) Check {
	c := Check{Name: "ksm", Status: Info}
	run, ok := h.number("sys/kernel/mm/ksm/run")
	switch {
	case !ok:
		c.Detail = "not in this kernel; not needed, --policy share shares without it"
	case run == 1:
		c.Detail = "on: merges equal pages of clones with --policy copy, for processor time"
	default:
		c.Detail = "off; not needed, --policy share shares without it"
	}
	return c
}

func (h *host) checkHugePages(context.Context) Check {
	c := Check{Name: "hugepages", Status: Info}
	pool, err := hugepages.Read(h.root)
	switch {
	case err != nil:
		c.Detail = err.Error()
	case pool.Total == 0:
		c.Detail = "none of 2 MiB; only run --hugepages needs them"
	default:
		c.Detail = fmt.Sprintf("%d of %d of 2 MiB are free, for run --hugepages", pool.Free, pool.Total)
	}
	return c
}

// number reads a file that holds one number.
func (h *host) number(path string) (int, bool) {
	b, err := os.ReadFile(filepath.Join(h.root, path))
	if err != nil {
		return 0, false
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	return n, err == nil
}

const (
	mib = 1 << 20
	gib = 1 << 30
)

func size(n int64) string {
	if n < 10*gib {
		return fmt.Sprintf("%d MiB", n/mib)
	}
	return fmt.Sprintf("%d GiB", n/gib)
}

func (h *host) checkMemory(context.Context) Check {
	c := Check{Name: "memory", Status: OK}
	b, err := os.ReadFile(filepath.Join(h.root, "proc/meminfo"))
	var n int64
	if err == nil {
		n, err = memAvailable(bytes.NewReader(b))
	}
	switch {
	case err != nil:
		c.Status, c.Detail = Warn, "cannot tell how much is available: "+err.Error()
	case n < 256*mib:
		c.Status, c.Detail = Fail, size(n)+" available: not enough for a VM"
		c.Fix = []string{"# stop what else runs, or add memory"}
	case n < gib:
		c.Status, c.Detail = Warn, size(n)+" available: enough for a small VM or two"
	default:
		c.Detail = size(n) + " available"
	}
	return c
}

// memAvailable reads the field of /proc/meminfo, in bytes.
func memAvailable(r io.Reader) (int64, error) {
	sc := bufio.NewScanner(r)
	for sc.Scan() {
		f := strings.Fields(sc.Text())
		if len(f) == 3 && f[0] == "MemAvailable:" && f[2] == "kB" {
			n, err := strconv.ParseInt(f[1], 10, 64)
			if err != nil || n < 0 || n > 1<<50 {
				return 0, fmt.Errorf("/proc/meminfo has %q", sc.Text())
			}
			return n << 10, nil
		}
	}
	return 0, errors.Join(errors.New("/proc/meminfo has no MemAvailable"), sc.Err())
}

// checkOvercommit: private mappings of one template reserve memory for each
// clone where the kernel promises no more than it has.
func (h *host) checkOvercommit(context.Context) Check {
	c := Check{Name: "overcommit", Status: OK, Detail: "clones need memory only for what they write"}
	if mode, ok := h.number("proc/sys/vm/overcommit_memory"); ok && mode == 2 {
		c.Status, c.Detail = Warn, "vm.overcommit_memory is 2: every clone reserves its whole size"
		c.Fix = []string{"sudo sysctl -w vm.overcommit_memory=0"}
	}
	return c
}

func (h *host) checkDisk(context.Context) Check {
	c := Check{Name: "disk", Status: OK}
	n, err := h.freeBytes(h.dataDir)
	free := size(n) + " free in " + h.dataDir
	switch {
	case err != nil:
		c.Status, c.Detail = Fail, fmt.Sprintf("cannot look at %s: %v", h.dataDir, err)
		c.Fix = []string{"fcvm --data-dir DIR …  # or FCVM_DATA_DIR: choose another directory"}
	case n < 256*mib:
		c.Status, c.Detail = Fail, free+": not enough for images and snapshots"
		c.Fix = []string{"fcvm snapshot rm …; fcvm image rm …  # or choose another --data-dir"}
	case n < 2*gib:
		c.Status, c.Detail = Warn, free+": a snapshot needs what its VM uses of its memory"
		c.Fix = []string{"fcvm snapshot rm …; fcvm image rm …  # or choose another --data-dir"}
	default:
		c.Detail = free
	}
	return c
}
