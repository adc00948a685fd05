//go:build linux

// Tool is the only program in the guest of the boot test.
package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	if err := run(os.Args[1], os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, "tool:", err)
		os.Exit(1)
	}
}

func run(name string, args []string) error {
	switch name {
	case "main": // the container's process
		fmt.Println("main is", os.Getpid() != 1)
		term := make(chan os.Signal, 1)
		signal.Notify(term, syscall.SIGTERM)
		<-term
		fmt.Fprintln(os.Stderr, "terminated")
		os.Exit(23)
	case "who":
		groups, err := os.Getgroups()
		if err != nil {
			return err
		}
		dir, err := os.Getwd()
		if err != nil {
			return err
		}
		fmt.Println(os.Getuid(), os.Getgid(), groups, os.Getenv("HOME"), dir)
	case "cat":
		for _, f := range args {
			b, err := os.ReadFile(f)
			if err != nil {
				return err
			}
			if _, err := os.Stdout.Write(b); err != nil {
				return err
			}
		}
		if len(args) == 0 {
			_, err := io.Copy(os.Stdout, os.Stdin)
			return err
		}
	case "write":
		return os.WriteFile(args[0], []byte(args[1]), 0o644)
	case "exit":
		code, err := strconv.Atoi(args[0])
		if err != nil {
			return err
		}
		fmt.Fprintln(os.Stderr, "exit with", code)
		os.Exit(code)
	case "size":
		ws, err := unix.IoctlGetWinsize(0, unix.TIOCGWINSZ)
		if err != nil {
			return err
		}
		fmt.Println(ws.Row, ws.Col)
	case "identity":
		host, err := os.Hostname()
		if err != nil {
			return err
		}
		random := make([]byte, 8)
		if _, err := unix.Getrandom(random, 0); err != nil {
			return err
		}
		fmt.Printf("%s %d %x\n", host, time.Now().Unix(), random)
	case "loopback":
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			return err
		}
		c.Close()
		addrs, err := net.InterfaceAddrs()
		if err != nil {
			return err
		}
		fmt.Println(addrs)
	case "limit":
		var l unix.Rlimit
		if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
			return err
		}
		fmt.Println(l.Max)
	case "orphan": // leaves a process that ends after its parent
		_, err := syscall.ForkExec("/tool", []string{"tool", "cat"}, &syscall.ProcAttr{Files: []uintptr{0}})
		return err
	case "zombies":
		return zombies()
	default:
		return fmt.Errorf("unknown command %q", name)
	}
	return nil
}

// zombies waits until there are none; the test's patience bounds it.
func zombies() error {
	for {
		found := 0
		stats, err := filepath.Glob("/proc/[0-9]*/stat")
		if err != nil {
			return err
		}
		for _, f := range stats {
			b, err := os.ReadFile(f)
			if err == nil && strings.Contains(string(b), ") Z ") {
				found++
			}
		}
		if found == 0 {
			return nil
		}
		time.Sleep(10 * time.Millisecond)
	}
}
