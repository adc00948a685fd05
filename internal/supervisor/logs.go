package supervisor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"github.com/fsnotify/fsnotify"

	"fcvm/internal/api"
	"fcvm/internal/guest/proto"
)

// Logs implements [api.Backend].
func (s *Supervisor) Logs(ctx context.Context, name string, req api.LogsRequest, begin func() io.Writer) error {
	m, err := s.find(name)
	if err != nil {
		return err
	}
	release := m.hold()
	defer release()
	var changes *fsnotify.Watcher
	if req.Follow {
		// Before the first look, so that nothing is missed in between.
		if changes, err = fsnotify.NewWatcher(); err != nil {
			return fmt.Errorf("follow log of VM %s: %w", m.name, err)
		}
		defer func() { _ = changes.Close() }()
		if err := changes.Add(m.dir()); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("follow log of VM %s: %w", m.name, err)
		}
	}
	f, err := m.openLog(ctx, changes)
	if err != nil {
		return fmt.Errorf("read log of VM %s: %w", m.name, err)
	}
	defer f.Close()
	filter, err := newFilter(f, req)
	if err != nil {
		return fmt.Errorf("read log of VM %s: %w", m.name, err)
	}
	return m.sendLog(ctx, f, filter, changes, begin())
}

// openLog opens the log, which the engine makes when the VMM starts; until then
// a follower waits.
func (m *machine) openLog(ctx context.Context, changes *fsnotify.Watcher) (*os.File, error) {
	for {
		ended := !m.live()
		f, err := os.Open(m.logFile())
		if !errors.Is(err, fs.ErrNotExist) {
			return f, err
		}
		if ended || changes == nil {
			return os.Open(os.DevNull)
		}
		if err := m.waitChange(ctx, changes); err != nil {
			return nil, err
		}
	}
}

// waitChange waits until something in the VM's directory changes, or the VM has
// ended.
func (m *machine) waitChange(ctx context.Context, changes *fsnotify.Watcher) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-m.exited:
			return nil
		case err, ok := <-changes.Errors:
			if !ok {
				return fs.ErrClosed
			}
			if !errors.Is(err, fsnotify.ErrEventOverflow) {
				return err
			}
			return nil // look again, for what the queue had no room for
		case ev, ok := <-changes.Events:
			if !ok {
				return fs.ErrClosed
			}
			if ev.Name == m.logFile() {
				return nil
			}
		}
	}
}

// sendLog writes records until the end: of the file, or with changes until the
// exit record or the end of the VM.
func (m *machine) sendLog(ctx context.Context, f *os.File, filter *filter, changes *fsnotify.Watcher, w io.Writer) error {
	log, err := proto.LogFile(f, -1)
	if err != nil {
		return err
	}
	for r := proto.NewLogReader(log); ; {
		// Asked before reading: after the end nothing is added.
		ended := !m.live()
		rec, err := r.Next()
		switch {
		case err == nil:
			if err := filter.write(w, rec); err != nil {
				return err
			}
			if rec.Stream == proto.Exit && changes != nil {
				return nil
			}
		case !errors.Is(err, io.EOF):
			return fmt.Errorf("read log of VM %s: %w", m.name, err)
		case ended || changes == nil:
			return nil
		default:
			if err := m.waitChange(ctx, changes); err != nil {
				return err
			}
		}
	}
}

// filter drops what was not asked for.
type filter struct {
	since time.Time
	// skip is the number of lines that are still to be dropped.
	skip int
}

// newFilter finds out how many lines the log has, where that matters.
func newFilter(f *os.File, req api.LogsRequest) (*filter, error) {
	flt := &filter{since: req.Since}
	if req.Tail < 0 {
		return flt, nil
	}
	log, err := proto.LogFile(f, -1)
	if err != nil {
		return nil, err
	}
	lines, open := 0, false
	for r := proto.NewLogReader(log); ; {
		rec, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
		if !flt.wants(rec) || len(rec.Data) == 0 {
			continue
		}
		lines += bytes.Count(rec.Data, []byte("\n"))
		open = rec.Data[len(rec.Data)-1] != '\n'
	}
	if open {
		lines++ // the last line has no end, yet
	}
	flt.skip = max(0, lines-req.Tail)
	return flt, nil
}

func (flt *filter) wants(rec proto.LogRecord) bool {
	return rec.Stream != proto.Exit && (flt.since.IsZero() || !rec.Time.Before(flt.since))
}

func (flt *filter) write(w io.Writer, rec proto.LogRecord) error {
	if rec.Stream == proto.Exit {
		return proto.WriteLogRecord(w, rec)
	}
	if !flt.wants(rec) {
		return nil
	}
	for flt.skip > 0 {
		i := bytes.IndexByte(rec.Data, '\n')
		if i < 0 {
			return nil
		}
		rec.Data = rec.Data[i+1:]
		flt.skip--
	}
	if len(rec.Data) == 0 {
		return nil
	}
	return proto.WriteLogRecord(w, rec)
}
