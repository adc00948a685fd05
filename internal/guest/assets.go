// Package guest provides what a VM boots: the kernel, and an initramfs with the
// kernel modules that the guest needs and fcvm-init as its first process.
//
// [Setup] makes them, once for a data directory; [Open] finds them. The files are
// named by their content and never change, so that a VM may be started while a setup
// is under way. Sub-packages hold what runs inside (guestd) and how it is talked to
// (agent, link, proto).
package guest

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
)

// ErrNotSetUp is wrapped when a data directory has no usable guest yet.
var ErrNotSetUp = errors.New("no guest kernel is set up; run `fcvm setup`")

// Cmdline is what the guest needs on the kernel's command line, beside what the
// engine knows (console, the frequency of the TSC). The network is given with [Network.Cmdline].
//
// reboot=t because a triple fault is the one way to end that every VMM sees
// (arch/x86/kernel/reboot.c); quiet because each line costs time on a serial console;
// transparent hugepages on demand only, because a clone that writes one byte into a
// fresh one would hold 2 MiB; no watchdog, because it wakes an idle guest every 4 s, and
// barks at each that was paused. tsc=reliable because a busy host makes the kernel lose
// its trust in the TSC at boot, microvm has no other clock, and without one an idle guest,
// and each clone of it, ticks 250 times a second (seen on 4 of 4 boots). TCG can't say by
// CPUID that its TSC, the host's, is one for all CPUs: of 39 guests with several CPUs on a
// busy host one hung ("APIC frequency too slow"); told, none of 180.
// No pressure-stall or memory-cgroup accounting, audit, security modules or zeroing of
// pages on allocation, because the VM is the container's boundary, and all of these run
// at each switch, system call or page of each clone. GODEBUG the kernel passes on to
// fcvm-init: preemption by signals runs code that a clone would have to translate, for
// goroutines that are all short.
const Cmdline = "reboot=t panic=-1 quiet loglevel=4 transparent_hugepage=madvise random.trust_cpu=on tsc=reliable nowatchdog " +
	"psi=0 cgroup_disable=memory audit=0 lsm= init_on_alloc=0 GODEBUG=asyncpreemptoff=1"

// Network is the static configuration of the guest's eth0.
type Network struct {
	// Address with its prefix length, such as "10.0.2.15/24".
	Address string
	// Gateway and DNS are addresses.
	Gateway, DNS string
}

// UserNetwork is what QEMU's user-mode network ("slirp") expects.
func UserNetwork() Network {
	return Network{Address: "10.0.2.15/24", Gateway: "10.0.2.2", DNS: "10.0.2.3"}
}

// Cmdline returns the parameters that fcvm-init reads from the kernel's command
// line.
func (n Network) Cmdline() string {
	return "fcvm.ip=" + n.Address + " fcvm.gw=" + n.Gateway + " fcvm.dns=" + n.DNS
}

// Assets are the files that a VM boots. Digests are "sha256:" and hexadecimal.
type Assets struct {
	// Kernel and Initrd are absolute paths.
	Kernel string `json:"-"`
	Initrd string `json:"-"`
	// KernelVersion as `uname -r` prints it, or "custom" when it cannot be told.
	KernelVersion string `json:"kernel_version"`
	KernelDigest  string `json:"kernel_digest"`
	InitrdDigest  string `json:"initrd_digest"`
	// InitDigest is the digest of the fcvm-init inside Initrd.
	InitDigest string `json:"init_digest"`
	// Source tells where the kernel came from, such as a package and its version.
	Source string `json:"source"`
	// SourceDigest is the digest of the package or file that Source names.
	SourceDigest string `json:"source_digest"`
	// Modules are the files in the modules directory, in no order.
	Modules []string `json:"modules"`
	// Extra are those of [SetupOptions].
	Extra []string `json:"extra,omitempty"`
	// Format of this file and of the initramfs.
	Format int `json:"format"`

	dir string
}

// format grows when an older initramfs or manifest must not be used any more.
const format = 1

const manifestName = "guest.json"

// Open returns what an earlier [Setup] put into dir. It checks that the files
// are there, not their content: [Assets.Verify] does. The error wraps
// [ErrNotSetUp] when there is nothing usable.
func Open(dir string) (*Assets, error) {
	b, err := os.ReadFile(filepath.Join(dir, manifestName))
	if errors.Is(err, os.ErrNotExist) {
		return nil, ErrNotSetUp
	}
	if err != nil {
		return nil, fmt.Errorf("open guest kernel: %w", err)
	}
	a := &Assets{dir: dir}
	if err := json.Unmarshal(b, a); err != nil {
		return nil, fmt.Errorf("open guest kernel: %s: %w: %w", manifestName, err, ErrNotSetUp)
	}
	if a.Format != format || !validDigest(a.KernelDigest) || !validDigest(a.InitrdDigest) {
		return nil, fmt.Errorf("open guest kernel: it was made by another version of fcvm: %w", ErrNotSetUp)
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return nil, fmt.Errorf("open guest kernel: %w", err)
	}
	a.Kernel = filepath.Join(dir, kernelName(a.KernelDigest))
	a.Initrd = filepath.Join(dir, initrdName(a.InitrdDigest))
	for _, f := range []string{a.Kernel, a.Initrd} {
		if _, err := os.Stat(f); err != nil {
			return nil, fmt.Errorf("open guest kernel: %w: %w", err, ErrNotSetUp)
		}
	}
	return a, nil
}

// Verify reads the files and compares their digests.
func (a *Assets) Verify() error {
	for file, want := range map[string]string{a.Kernel: a.KernelDigest, a.Initrd: a.InitrdDigest} {
		got, err := digestFile(file)
		if err != nil {
			return fmt.Errorf("verify guest kernel: %w", err)
		}
		if got != want {
			return fmt.Errorf("verify guest kernel: %s has changed: %w", file, ErrNotSetUp)
		}
	}
	return nil
}

// CopyTo makes dir a directory that [Open] takes, with files that no later setup
// removes: copies, so that the two may lie on different file systems.
func (a *Assets) CopyTo(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("copy guest kernel: %w", err)
	}
	manifest, err := json.MarshalIndent(a, "", "  ")
	if err != nil {
		return fmt.Errorf("copy guest kernel: %w", err)
	}
	for _, file := range []string{a.Kernel, a.Initrd} {
		b, err := os.ReadFile(file)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, filepath.Base(file)), b, 0o644)
		}
		if err != nil {
			return fmt.Errorf("copy guest kernel: %w", err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, manifestName), manifest, 0o644); err != nil {
		return fmt.Errorf("copy guest kernel: %w", err)
	}
	return nil
}

func kernelName(digest string) string { return "vmlinuz-" + short(digest) }
func initrdName(digest string) string { return "initramfs-" + short(digest) + ".cpio.gz" }
func modulesName(kernelDigest string) string {
	return "modules-" + short(kernelDigest)
}

const digestPrefix = "sha256:"

func short(digest string) string { return digest[len(digestPrefix):][:16] }

func validDigest(d string) bool {
	if len(d) != len(digestPrefix)+2*sha256.Size || d[:len(digestPrefix)] != digestPrefix {
		return false
	}
	_, err := hex.DecodeString(d[len(digestPrefix):])
	return err == nil
}

func digestFile(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", fmt.Errorf("read %s: %w", path, err)
	}
	return digestPrefix + hex.EncodeToString(h.Sum(nil)), nil
}
