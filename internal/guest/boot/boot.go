// Package boot is what fcvm-init does as the guest's first process: it makes a
// machine out of a kernel, becomes the agent, and ends the machine with the
// container.
//
// Nothing here returns to a shell. What fails is printed to the console, whose
// tail the host shows, and ends the VM.
package boot

import (
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"fcvm/internal/guest/guestd"
	"fcvm/internal/guest/link"
)

const (
	// memoryLimit is where the garbage collector begins to work. Below it stays
	// still, because marking writes to pages that a clone then has to own.
	memoryLimit = 16 << 20
	// byeTime is how long the host has to read the last output.
	byeTime = 2 * time.Second
)

// Config is what differs between a container's VM and another machine that the agent
// is to run on.
type Config struct {
	// Version of fcvm, which the agent tells.
	Version string
	// Modules are loaded first; those of the virtio devices follow.
	Modules []string
	// Root is the read-only file system below the layer in memory that everything
	// is written to.
	Root Mount
	// Ready, unless nil, is called in the new root before the agent begins.
	Ready func() error
}

// Container is the configuration of a container's VM.
func Container(version string) Config {
	return Config{
		Version: version,
		Modules: []string{"virtio_mmio", "erofs", "overlay"},
		Root:    Mount{Source: rootDevice, Type: "erofs"},
	}
}

// Run is PID 1. It does not return.
func Run(c Config) {
	runtime.GOMAXPROCS(1) // one idle thread less for each further CPU
	debug.SetGCPercent(-1)
	debug.SetMemoryLimit(memoryLimit)
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, nil)))
	if err := run(c); err != nil {
		fmt.Fprintln(os.Stderr, "fcvm-init: error:", err)
	}
	end()
}

func run(c Config) error {
	if err := mountFirst(); err != nil {
		return err
	}
	line, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return fmt.Errorf("read kernel command line: %w", err)
	}
	params := parseCmdline(string(line))
	if err := loadModules(params, c.Modules); err != nil {
		return err
	}
	calm()
	if err := enterRoot(c.Root); err != nil {
		return err
	}
	if c.Ready != nil {
		if err := c.Ready(); err != nil {
			return err
		}
	}
	if err := setLimits(); err != nil {
		return err
	}
	address, err := configureNetwork(params)
	if err != nil {
		return err
	}
	p, err := openAgent(params)
	if err != nil {
		return err
	}
	record, err := openLog(params)
	if err != nil {
		return err
	}
	m, err := newMachine()
	if err != nil {
		return err
	}
	s := guestd.New(guestd.Config{
		System:     m,
		Children:   guestd.NewReaper(),
		Etc:        "/etc",
		Log:        record,
		Address:    address,
		Nameserver: params["fcvm.dns"],
		Version:    c.Version,
	})
	g := link.NewGuest(p, s)
	failed := make(chan error, 1)
	go func() { failed <- g.Serve() }()
	select {
	case <-s.Exited():
		g.Bye(byeTime)
		return nil
	case err := <-failed:
		return fmt.Errorf("serve agent: %w", err)
	}
}

// openAgent opens the agent's end of its link: a virtio-serial port, or a vsock
// port where the VMM says so, which has no other.
func openAgent(params map[string]string) (link.Port, error) {
	if n := params["fcvm.vsock"]; n != "" {
		return listenVsock(n)
	}
	f, err := openPort("fcvm.agent")
	if err != nil {
		return nil, err
	}
	return newPort(f)
}

// openLog opens what log records are written to: likewise.
func openLog(params map[string]string) (io.Writer, error) {
	if path := params["fcvm.log"]; path != "" {
		return openLogDevice(path)
	}
	f, err := openPort("fcvm.log")
	if err != nil {
		return nil, err
	}
	return &logPort{f: f}, nil
}

// calm stops what the kernel does by itself, and what a hundred idle clones would
// all do: proactive compaction looks around twice a second, and moves pages that are
// shared until then; statistics are folded every second.
func calm() {
	for name, value := range map[string]string{
		"compaction_proactiveness": "0",
		"stat_interval":            "120",
	} {
		// A kernel without it is as calm.
		_ = os.WriteFile("/proc/sys/vm/"+name, []byte(value), 0)
	}
}

// end ends the VM: with reboot=t on the command line a restart is a triple fault,
// at which every VMM ends.
func end() {
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART) // returns only if we may not
	os.Exit(1)                                     // the kernel panics, and reboots too
}

// parseCmdline splits the kernel's command line into parameters; of two of one
// name the last counts.
func parseCmdline(line string) map[string]string {
	params := map[string]string{}
	for _, word := range strings.Fields(line) {
		name, value, _ := strings.Cut(word, "=")
		params[name] = value
	}
	return params
}
