//go:build linux

package main

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
)

// maxEntries bounds the entries of a tar stream that a guest sends: a directory
// that never ends must not fill the host's inodes unnoticed.
const maxEntries = 10_000_000

// harmless returns a guest's tar stream without what does harm on the host:
// device files, set-user-ID and set-group-ID bits, and extended attributes (file
// capabilities among them). It also returns the first header. The stream must be
// closed, which closes its source.
func harmless(r io.ReadCloser) (*tar.Header, io.ReadCloser, error) {
	tr := tar.NewReader(r)
	first, err := tr.Next()
	if errors.Is(err, io.EOF) {
		return nil, nil, errors.New("the VM sent nothing")
	}
	if err != nil {
		return nil, nil, fmt.Errorf("read tar stream: %w", err)
	}
	pr, pw := io.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		pw.CloseWithError(filter(pw, tr, first))
	}()
	return first, &filtered{PipeReader: pr, source: r, done: done}, nil
}

// filtered waits for its writer when it is closed.
type filtered struct {
	*io.PipeReader
	source io.Closer
	done   chan struct{}
}

func (f *filtered) Close() error {
	// The source first: the writer may be waiting for a guest that sends nothing.
	err := errors.Join(f.source.Close(), f.PipeReader.Close())
	<-f.done
	return err
}

func filter(w io.Writer, tr *tar.Reader, hdr *tar.Header) error {
	tw := tar.NewWriter(w)
	for n := 1; ; n++ {
		if n > maxEntries {
			return fmt.Errorf("the VM sent more than %d files", maxEntries)
		}
		switch hdr.Typeflag {
		case tar.TypeReg, tar.TypeDir, tar.TypeSymlink, tar.TypeLink:
			out := &tar.Header{
				Typeflag: hdr.Typeflag, Name: hdr.Name, Linkname: hdr.Linkname, Size: hdr.Size,
				Mode: hdr.Mode & 0o1777, ModTime: hdr.ModTime, Format: tar.FormatPAX,
			}
			if err := tw.WriteHeader(out); err != nil {
				return fmt.Errorf("copy tar entry %q: %w", hdr.Name, err)
			}
			if _, err := io.Copy(tw, tr); err != nil {
				return fmt.Errorf("copy tar entry %q: %w", hdr.Name, err)
			}
		default: // devices, pipes and whatever else
		}
		var err error
		hdr, err = tr.Next()
		if errors.Is(err, io.EOF) {
			return tw.Close()
		}
		if err != nil {
			return fmt.Errorf("read tar stream: %w", err)
		}
	}
}
