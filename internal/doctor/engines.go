//go:build linux && amd64

package doctor

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"fcvm/internal/guest"
	"fcvm/internal/vmm/firecracker"
)

func (h *host) checkPrograms(context.Context) Check {
	c := Check{Name: "programs", Status: OK, Detail: "uffd_handler and fcvm-init are beside fcvm in " + h.binDir}
	var missing []string
	for _, name := range []string{"uffd_handler", "fcvm-init"} {
		if fi, err := os.Stat(filepath.Join(h.binDir, name)); err != nil || fi.IsDir() || fi.Mode()&0o111 == 0 {
			missing = append(missing, name)
		}
	}
	if len(missing) > 0 {
		c.Status = Fail
		c.Detail = strings.Join(missing, " and ") + " must be beside fcvm in " + h.binDir
		c.Fix = []string{"make build  # in fcvm's source, then copy all of bin/"}
	}
	return c
}

func (h *host) checkGuest(context.Context) Check {
	c := Check{Name: "guest", Status: OK}
	a, err := h.guest(h.guestDir)
	if err == nil {
		c.Detail = fmt.Sprintf("kernel %s, from %s", a.KernelVersion, a.Source)
		return c
	}
	c.Status, c.Detail, c.Fix = Fail, err.Error(), []string{"fcvm setup"}
	if errors.Is(err, guest.ErrNotSetUp) {
		c.Detail = "no guest kernel is set up in " + h.guestDir
	}
	return c
}

func (h *host) checkQEMU(ctx context.Context) Check {
	info, err := h.engine(ctx)
	if err != nil {
		c := Check{Name: "qemu", Status: Fail, Detail: err.Error(), Fix: []string{
			"sudo apt install qemu-system-x86     # Debian, Ubuntu",
			"sudo dnf install qemu-system-x86-core  # Fedora",
		}}
		if _, err := h.choose(ctx); err == nil {
			c.Status = Info // another one runs VMs
		}
		return c
	}
	return Check{Name: "qemu", Status: OK, Detail: fmt.Sprintf("QEMU %s, with %s", info.Version, info.Accel)}
}

// checkKVM asks what the engine asks when it chooses.
func (h *host) checkKVM(context.Context) Check {
	c := Check{Name: "kvm", Status: OK, Detail: "usable"}
	err := h.kvm()
	if err == nil {
		return c
	}
	c.Status = Warn
	c.Detail = err.Error() + "; guests run on TCG, many times slower"
	switch {
	case errors.Is(err, os.ErrPermission):
		c.Fix = []string{
			fmt.Sprintf("sudo usermod -aG kvm %s  # then log in anew", h.user),
			fmt.Sprintf("sudo setfacl -m u:%s:rw /dev/kvm  # or: at once, until the next boot", h.user),
		}
	case errors.Is(err, os.ErrNotExist) && h.cpuHas("vmx"):
		c.Fix = []string{"sudo modprobe kvm_intel"}
	case errors.Is(err, os.ErrNotExist) && h.cpuHas("svm"):
		c.Fix = []string{"sudo modprobe kvm_amd"}
	case h.cpuHas("hypervisor"):
		c.Fix = []string{
			"# this machine is a VM: on its host, allow nesting and show the guest the host's processor, such as",
			"echo options kvm_intel nested=1 | sudo tee /etc/modprobe.d/kvm.conf  # kvm_amd on AMD",
		}
	default:
		c.Fix = []string{"# enable virtualization (VT-x, AMD-V) in the machine's firmware"}
	}
	return c
}

// cpuHas tells whether the processor has a flag of /proc/cpuinfo.
func (h *host) cpuHas(flag string) bool {
	b, err := os.ReadFile(filepath.Join(h.root, "proc/cpuinfo"))
	if err != nil {
		return false
	}
	sc := bufio.NewScanner(bytes.NewReader(b))
	for sc.Scan() {
		if k, v, ok := strings.Cut(sc.Text(), ":"); ok && strings.TrimSpace(k) == "flags" {
			return strings.Contains(" "+v+" ", " "+flag+" ")
		}
	}
	return false
}

// checkNetwork: some distributions build QEMU without libslirp.
func (h *host) checkNetwork(ctx context.Context) Check {
	c := Check{Name: "network", Status: OK, Detail: "QEMU has user-mode networking: published ports need no root"}
	info, err := h.engine(ctx)
	if err != nil {
		return Check{Name: "network", Status: Info, Detail: "not asked, for there is no QEMU"}
	}
	out, err := h.output(ctx, info.Path, "-netdev", "help")
	switch {
	case err != nil:
		c.Status, c.Detail = Warn, "cannot ask QEMU for its network back ends: "+err.Error()
	case !hasLine(out, "user"):
		c.Status, c.Detail = Fail, "this QEMU has no user-mode networking (libslirp): VMs have no network"
		c.Fix = []string{"# install a QEMU that was built with slirp, as those of Debian and Fedora are"}
	}
	return c
}

func hasLine(b []byte, want string) bool {
	for line := range strings.Lines(string(b)) {
		if strings.TrimSpace(line) == want {
			return true
		}
	}
	return false
}

func (h *host) checkFirecracker(ctx context.Context) Check {
	c := Check{Name: "firecracker", Status: Info}
	p, err := h.firecracker(ctx)
	switch {
	case errors.Is(err, firecracker.ErrNotFound):
		c.Detail = "not there; not needed, QEMU runs VMs as well"
		c.Fix = []string{"fcvm setup --engine firecracker  # installs it, if you want it"}
		return c
	case err != nil:
		c.Detail = err.Error() + "; not needed, QEMU runs VMs as well"
		return c
	}
	c.Detail = fmt.Sprintf("Firecracker %s at %s", p.Version, p.Path)
	if p.Jailer == "" {
		c.Detail += ", without a jailer beside it"
	}
	return c
}

// checkJail says whether `fcvm run --jail` can work.
func (h *host) checkJail(ctx context.Context) Check {
	c := Check{Name: "jail", Status: Info, Detail: "--jail locks Firecracker up"}
	p, err := h.firecracker(ctx)
	switch jailErr := h.jail(); {
	case jailErr != nil:
		c.Detail = jailErr.Error()
	case err != nil || p.Jailer == "":
		c.Detail = "--jail needs Firecracker and its jailer"
		c.Fix = []string{"fcvm setup --engine firecracker  # installs both"}
	}
	return c
}

// checkEngine says which engine `fcvm run` takes where none is named, and why.
func (h *host) checkEngine(ctx context.Context) Check {
	c := Check{Name: "engine", Status: OK}
	chosen, err := h.choose(ctx)
	var why []string
	for _, p := range chosen.Passed {
		why = append(why, p.Name+": "+p.Reason)
	}
	if err != nil {
		c.Status, c.Detail = Fail, "VMs cannot run: "+strings.Join(why, "; ")
		c.Fix = []string{"# install QEMU, as above"}
		return c
	}
	c.Detail = fmt.Sprintf("VMs run on %s %s with %s, unless --engine says otherwise", chosen.Info.Name, chosen.Info.Version, chosen.Info.Accel)
	if len(why) > 0 {
		c.Detail += " (not " + strings.Join(why, "; ") + ")"
	}
	return c
}
