//go:build linux

package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"fcvm/internal/api"
	"fcvm/internal/doctor"
	"fcvm/internal/guest"
	"fcvm/internal/vmm/firecracker"
	"fcvm/internal/vmm/firecracker/release"
	"fcvm/internal/vmm/qemu"
)

const setupLong = `Install the guest's kernel, the modules that it needs, and an initramfs with
fcvm-init, and check this machine.

The kernel is Debian's or Ubuntu's linux-image-cloud-amd64, which apt downloads
(nothing is installed on this machine), or a Debian mirror; --kernel-deb takes a
package that you have, --kernel a kernel of your own with --modules.

With --engine firecracker it installs Firecracker and its jailer as well, the
release that fcvm is tested with: downloaded from the project's own page and checked by
its SHA-256, or taken with --release from a file or a mirror. --firecracker names
one that you have; it is then used where it is, whatever its version.

It can be run again at any time, and does only what is missing.`

type setupOptions struct {
	kernelDeb, kernel, modules, mirror string
	engine, release, firecracker       string
	refresh, json                      bool
}

func newSetup(a *app) *cobra.Command {
	var o setupOptions
	cmd := &cobra.Command{
		Use:   "setup [flags]",
		Short: "Install the guest kernel, and check this machine",
		Long:  setupLong,
		Args:  exactly(0, ""),
		RunE:  func(cmd *cobra.Command, _ []string) error { return a.setup(cmd.Context(), o) },
	}
	f := cmd.Flags()
	f.StringVar(&o.kernelDeb, "kernel-deb", "", "take kernel and modules from this Debian package `FILE`")
	f.StringVar(&o.kernel, "kernel", "", "take this kernel `FILE` (bzImage or vmlinux)")
	f.StringVar(&o.modules, "modules", "", "`DIR` with the modules of --kernel, such as /lib/modules/VERSION")
	f.StringVar(&o.mirror, "mirror", "", "download from the Debian mirror at `URL`")
	f.StringVar(&o.engine, "engine", "", "install this `engine`, too: firecracker (QEMU is a package of your distribution)")
	f.StringVar(&o.release, "release", "", "take Firecracker's release from this `FILE` or URL (default: the project's page)")
	f.StringVar(&o.firecracker, "firecracker", "", "use the Firecracker at `PATH`, and the jailer beside it")
	f.BoolVar(&o.refresh, "refresh", false, "download the kernel even if there is one")
	f.BoolVar(&o.json, "json", false, "print JSON")
	return cmd
}

// setupResult is the schema of setup --json.
type setupResult struct {
	Version int    `json:"version"`
	Kernel  string `json:"kernel"`
	Initrd  string `json:"initrd"`
	*guest.Assets
	Firecracker *release.Installed `json:"firecracker,omitempty"`
}

// checkEngine says whether Firecracker is to be set up.
func (o *setupOptions) checkEngine(ctx context.Context) (bool, error) {
	if o.release != "" && o.firecracker != "" {
		return false, invalid("--release and --firecracker exclude each other")
	}
	wanted := o.release != "" || o.firecracker != ""
	switch o.engine {
	case "":
	case firecracker.Name:
		wanted = true
	case qemu.Name:
		if wanted {
			return false, invalid("--release and --firecracker are about the engine firecracker")
		}
	default:
		return false, invalid("bad --engine %q: want firecracker or qemu", o.engine)
	}
	if o.firecracker != "" {
		// Now, and not when the first VM is started.
		if _, err := firecracker.New(firecracker.Options{Binary: o.firecracker}).Find(ctx); err != nil {
			return false, invalid("--firecracker: %v", err)
		}
	}
	return wanted, nil
}

func (a *app) setup(ctx context.Context, o setupOptions) error {
	if o.kernel != "" && o.kernelDeb != "" {
		return invalid("--kernel and --kernel-deb exclude each other")
	}
	if o.modules != "" && o.kernel == "" {
		return invalid("--modules needs --kernel")
	}
	withFirecracker, err := o.checkEngine(ctx)
	if err != nil {
		return err
	}
	initBinary, err := besideFCVM("fcvm-init")
	if err != nil {
		return err
	}
	if _, err := besideFCVM("uffd_handler"); err != nil {
		return err
	}
	l, err := a.layout()
	if err != nil {
		return err
	}
	p := a.ui.Progress()
	defer p.Done()
	assets, err := guest.Setup(ctx, guest.SetupOptions{
		Dir: l.Guest(), KernelDeb: o.kernelDeb, Kernel: o.kernel, Modules: o.modules, InitBinary: initBinary,
		Mirror: o.mirror, Refresh: o.refresh,
		Progress: func(stage string, done, total int64) { p.Set(stage, done, total) },
	})
	var fc *release.Installed
	if err == nil && withFirecracker {
		fc, err = release.Install(ctx, release.Options{
			Dir: l.Firecracker(), Archive: o.release, Program: o.firecracker,
			Progress: func(stage string, done, total int64) { p.Set(stage, done, total) },
		})
	}
	p.Done()
	if err != nil {
		return err
	}
	if o.json {
		return a.ui.JSON(setupResult{api.SchemaVersion, assets.Kernel, assets.Initrd, assets, fc})
	}
	if err := a.ui.Println("guest kernel " + assets.KernelVersion + " is set up in " + l.Guest()); err != nil {
		return err
	}
	if fc != nil {
		text := "Firecracker " + fc.Version + " and its jailer are set up in " + filepath.Dir(fc.Firecracker)
		if fc.Version == "" {
			text = "the Firecracker that is used is " + fc.Firecracker
		}
		if err := a.ui.Println(text); err != nil {
			return err
		}
	}
	// What is amiss with the machine is told, but the setup has succeeded.
	p.Set("checking this machine", 0, 0)
	report := doctor.Run(ctx, l)
	p.Done()
	if err := ctx.Err(); err != nil {
		return err
	}
	for _, c := range report.Checks {
		if c.Status == doctor.Warn || c.Status == doctor.Fail {
			a.ui.Warn(c.Name + ": " + c.Detail)
		}
	}
	if report.Failed() {
		a.ui.Hint("`fcvm doctor` says how to mend it")
	}
	return nil
}

// besideFCVM finds another program of fcvm's, which lies in the same directory.
func besideFCVM(name string) (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("find fcvm's own directory: %w", err)
	}
	if real, err := filepath.EvalSymlinks(self); err == nil {
		self = real
	}
	path := filepath.Join(filepath.Dir(self), name)
	fi, err := os.Stat(path)
	switch {
	case err != nil && os.IsNotExist(err):
		return "", &api.Error{
			Code:    api.CodeUnavailable,
			Message: fmt.Sprintf("%s is missing: it belongs beside fcvm, in %s", name, filepath.Dir(self)),
			Hint:    "`go install ./cmd/...` or `make build` makes all three programs",
		}
	case err != nil:
		return "", fmt.Errorf("find %s: %w", name, err)
	case !fi.Mode().IsRegular() || fi.Mode().Perm()&0o111 == 0:
		return "", &api.Error{Code: api.CodeUnavailable, Message: path + " is not a program", Hint: "chmod +x " + strings.ReplaceAll(path, " ", `\ `)}
	}
	return path, nil
}
