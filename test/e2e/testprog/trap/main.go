// Trap prints the signals it gets, and ends with a code of its own at SIGTERM.
package main

import (
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	c := make(chan os.Signal, 8)
	signal.Notify(c, syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM, syscall.SIGUSR1)
	fmt.Println("ready")
	for s := range c {
		fmt.Println("got", s)
		switch s {
		case syscall.SIGTERM:
			os.Exit(42)
		case syscall.SIGINT:
			os.Exit(43)
		}
	}
}
