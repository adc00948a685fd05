//go:build linux

package main

import (
	"context"
	"os"
	"os/signal"
	"sync"
	"syscall"
)

// interrupts owns the signals of the program. At first a signal ends the
// context, and so whatever goes on; after forward it goes to the process in the
// VM instead.
type interrupts struct {
	// ctx ends with the first signal.
	ctx    context.Context
	cancel context.CancelFunc
	ch     chan os.Signal
	done   chan struct{}

	mu     sync.Mutex
	got    os.Signal       // guarded by mu; the signal that ended ctx
	handle func(os.Signal) // guarded by mu; nil as long as signals end ctx
}

func newInterrupts() *interrupts {
	i := &interrupts{ch: make(chan os.Signal, 16), done: make(chan struct{})}
	i.ctx, i.cancel = context.WithCancel(context.Background())
	signal.Notify(i.ch, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	go i.loop()
	return i
}

func (i *interrupts) loop() {
	defer close(i.done)
	for sig := range i.ch {
		i.mu.Lock()
		handle := i.handle
		if handle == nil && i.got == nil {
			i.got = sig
			i.cancel()
		}
		i.mu.Unlock()
		if handle != nil {
			handle(sig)
		}
	}
}

// forward sends signals to handle from now on, those with which processes talk
// to each other too. handle is called by one goroutine. It is called at once with
// a signal that came before, whose context has then ended.
func (i *interrupts) forward(handle func(os.Signal)) {
	i.mu.Lock()
	i.handle = handle
	got := i.got
	i.got = nil
	i.mu.Unlock()
	signal.Notify(i.ch, forwarded()...)
	if got != nil {
		select {
		case i.ch <- got:
		default: // full of other signals
		}
	}
}

// signal returns the signal that ended the context, or nil.
func (i *interrupts) signal() os.Signal {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.got
}

func (i *interrupts) close() {
	signal.Stop(i.ch)
	close(i.ch)
	<-i.done
	i.cancel()
}

// forwarded are the signals that go to the process in the VM. Not among them are
// those about the terminal's own process (TSTP, CONT, TTIN, TTOU, WINCH), about
// faults, and those that the Go runtime uses (URG, PIPE).
func forwarded() []os.Signal {
	return []os.Signal{
		syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2,
		syscall.SIGALRM, syscall.SIGVTALRM, syscall.SIGPROF, syscall.SIGIO, syscall.SIGPWR,
	}
}
