package flock

import (
	"context"
	"errors"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestOpen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	a, err := Open(t.Context(), path, unix.LOCK_SH, nil)
	if err != nil {
		t.Fatal(err)
	}
	b, err := Open(t.Context(), path, unix.LOCK_SH, func() { t.Error("two who share wait for each other") })
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	stop := errors.New("stop")
	if _, err := Open(ctx, path, unix.LOCK_EX, func() { cancel(stop) }); !errors.Is(err, stop) {
		t.Errorf("Open = %v", err)
	}
	waits := make(chan struct{})
	got := make(chan error, 1)
	go func() {
		f, err := Open(t.Context(), path, unix.LOCK_EX, func() { close(waits) })
		if err == nil {
			err = f.Close()
		}
		got <- err
	}()
	<-waits
	a.Close()
	b.Close()
	if err := <-got; err != nil {
		t.Error(err)
	}
}
