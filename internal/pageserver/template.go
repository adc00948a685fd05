//go:build linux

package pageserver

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// template is shared memory that clones map privately. Its pages are filled when
// the first clone needs them, and never change after that. A page of zeros stays a
// hole, for which clones get the kernel's zero page: it costs nothing.
//
// A page is written whole, by pwrite(2): the kernel lets nobody see it before it
// is complete. Stores through a mapping would be seen one by one.
type template struct {
	file   *os.File
	source *source
	// A page is in neither, or in one of these, for ever.
	filled, zero bitmap
	// locks guard the filling of windows, by their number modulo the number of
	// locks, so that a page is read and written once: TestTemplateFillsOnce.
	locks [64]sync.Mutex
	bytes atomic.Int64
}

// pageState is what the template has of a page.
type pageState int

const (
	pageUnknown pageState = iota
	pageFilled
	pageZero
)

// newTemplate takes over an empty file of shared memory, which it makes as large
// as the source. The file stays the caller's to close.
func newTemplate(file *os.File, src *source) (*template, error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(file.Fd()), &st); err != nil {
		return nil, fmt.Errorf("check template: %w", err)
	}
	if st.Type != unix.TMPFS_MAGIC {
		return nil, fmt.Errorf("check template: %s is not on tmpfs; the kernel has userfaultfd for no other files: try /dev/shm", file.Name())
	}
	fi, err := file.Stat()
	if err != nil {
		return nil, fmt.Errorf("check template: %w", err)
	}
	if fi.Size() != 0 && fi.Size() != src.size {
		return nil, fmt.Errorf("check template: %s has %d bytes, but the memory file %d", file.Name(), fi.Size(), src.size)
	}
	if fi.Size() == 0 {
		if err := file.Truncate(src.size); err != nil {
			return nil, fmt.Errorf("make template: %w", err)
		}
	}
	if _, err := unix.Seek(int(file.Fd()), 0, unix.SEEK_DATA); !errors.Is(err, unix.ENXIO) {
		return nil, fmt.Errorf("check template: %s is not empty; remove it", file.Name())
	}
	pages := src.size / pageSize
	t := &template{file: file, source: src, filled: newBitmap(pages), zero: newBitmap(pages)}
	return t, t.checkGranularity()
}

// checkGranularity makes sure that writing a page brings that page, and no other,
// into being. Where shared memory has huge pages (shmem_enabled, the mount option huge=),
// the kernel makes 2 MiB of zeros around it, and clones would read those.
func (t *template) checkGranularity() error {
	buf := make([]byte, pageSize)
	if err := t.source.read(buf, 0); err != nil {
		return err
	}
	if err := t.write(buf, 0); err != nil {
		return err
	}
	hole, err := unix.Seek(int(t.file.Fd()), 0, unix.SEEK_HOLE)
	if err != nil {
		return fmt.Errorf("check template: %w", err)
	}
	if hole != pageSize {
		return fmt.Errorf("check template: writing a page of it made %d bytes; shared memory uses huge pages here: write \"never\" or \"advise\" to /sys/kernel/mm/transparent_hugepage/shmem_enabled, or use --policy copy", hole)
	}
	return nil
}

func (t *template) state(page int64) pageState {
	switch {
	case t.filled.has(page):
		return pageFilled
	case t.zero.has(page):
		return pageZero
	default:
		return pageUnknown
	}
}

// need makes sure that the page at off is known, and fills the window around it.
// When it was not known before, data is the page's content, in buf; else nil. With
// now it does not wait for another filler, but returns errSlow.
func (t *template) need(off int64, buf []byte, read reader, now bool) (data []byte, _ pageState, _ error) {
	if s := t.state(off / pageSize); s != pageUnknown {
		return nil, s, nil
	}
	start := off / window * window
	lock := &t.locks[off/window%int64(len(t.locks))]
	if now && !lock.TryLock() {
		return nil, 0, errSlow
	} else if !now {
		lock.Lock()
	}
	defer lock.Unlock()
	if s := t.state(off / pageSize); s != pageUnknown {
		return nil, s, nil
	}
	buf = buf[:min(window, t.source.size-start)]
	if err := read(buf, start); err != nil {
		return nil, 0, err
	}
	at := off - start
	data = buf[at : at+pageSize]
	if err := t.fill(buf, start); err != nil {
		return data, pageUnknown, err
	}
	return data, t.state(off / pageSize), nil
}

// fill writes those pages of buf that are not zero and not there yet, as few
// writes as that takes.
func (t *template) fill(buf []byte, off int64) error {
	for at := 0; at < len(buf); {
		page := (off + int64(at)) / pageSize
		if t.state(page) != pageUnknown {
			at += pageSize
			continue
		}
		if isZero(buf[at : at+pageSize]) {
			t.zero.set(page)
			at += pageSize
			continue
		}
		end := at + pageSize
		for end < len(buf) && t.state((off+int64(end))/pageSize) == pageUnknown && !isZero(buf[end:end+pageSize]) {
			end += pageSize
		}
		if err := t.write(buf[at:end], off+int64(at)); err != nil {
			return err
		}
		at = end
	}
	return nil
}

func (t *template) write(data []byte, off int64) error {
	if _, err := t.file.WriteAt(data, off); err != nil {
		return fmt.Errorf("fill template: %w", err)
	}
	for p := off / pageSize; p < (off+int64(len(data)))/pageSize; p++ {
		t.filled.set(p)
	}
	t.bytes.Add(int64(len(data)))
	return nil
}
