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
// the first clone needs them, or before, and never change after that. A page of
// zeros stays a hole, for which clones get the kernel's zero page: it costs nothing.
//
// A page is written whole, by pwrite(2): the kernel lets nobody see it before it
// is complete. Stores through a mapping would be seen one by one.
type template struct {
	file   *os.File
	source *source
	filled bitmap
	// locks guard the filling of windows, by their number modulo the number of
	// locks, so that a page is read and written once: TestTemplateFillsOnce.
	locks [64]sync.Mutex
	bytes atomic.Int64
	// cached are windows, by their number, that the page cache may still hold of
	// the source; grew gets a word when there are some, and told is whether it did since
	// dropSource.
	cached bitmap
	grew   chan struct{}
	told   atomic.Bool
}

// newTemplate takes over a file of shared memory, which it makes as large as the
// source. The file stays the caller's to close. It is empty, unless an earlier
// page server, of the same source, filled it.
func newTemplate(file *os.File, src *source, used bool) (*template, error) {
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
	t := &template{
		file: file, source: src, filled: newBitmap(src.size / pageSize),
		cached: newBitmap((src.size + window - 1) / window), grew: make(chan struct{}, 1),
	}
	if used {
		return t, t.findFilled()
	}
	if _, err := unix.Seek(int(file.Fd()), 0, unix.SEEK_DATA); !errors.Is(err, unix.ENXIO) {
		return nil, fmt.Errorf("check template: %s is not empty; remove it", file.Name())
	}
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

// findFilled notes what is there already. A predecessor that was killed has left
// no page half written: pwrite(2) ends between pages, its source being locked in
// memory (see buffers).
func (t *template) findFilled() error {
	fd := int(t.file.Fd())
	for pos := int64(0); ; {
		data, err := unix.Seek(fd, pos, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil
		}
		if err == nil {
			pos, err = unix.Seek(fd, data, unix.SEEK_HOLE)
		}
		if err != nil {
			return fmt.Errorf("look at template: %w", err)
		}
		for p := data / pageSize; p < pos/pageSize; p++ {
			t.filled.set(p)
		}
		t.bytes.Add(pos - data)
	}
}

// known tells whether nothing is left to do for a page.
func (t *template) known(page int64) bool { return t.filled.has(page) || t.source.zero.has(page) }

// need makes sure that the page at off is known, and fills the window around it.
// When it was not known before, data is the page's content, in buf; else nil. With
// now it waits neither for the disk nor for another filler, but returns errSlow.
func (t *template) need(off int64, buf []byte, now bool) (data []byte, _ error) {
	if t.known(off / pageSize) {
		return nil, nil
	}
	start := off / window * window
	lock := &t.locks[off/window%int64(len(t.locks))]
	if now && !lock.TryLock() {
		return nil, errSlow
	} else if !now {
		lock.Lock()
	}
	defer lock.Unlock()
	if t.known(off / pageSize) {
		return nil, nil
	}
	read := t.source.read
	if now {
		read = t.source.readNow
	}
	buf = buf[:min(window, t.source.size-start)]
	if err := read(buf, start); err != nil {
		return nil, err
	}
	at := off - start
	return buf[at : at+pageSize], t.fill(buf, start)
}

// fillAhead fills a window before anybody needs it, and returns how many bytes
// that made; 0 when somebody else is at it.
func (t *template) fillAhead(start int64, buf []byte, read reader) (int64, error) {
	buf = buf[:min(window, t.source.size-start)]
	lock := &t.locks[start/window%int64(len(t.locks))]
	if !lock.TryLock() {
		return 0, nil
	}
	defer lock.Unlock()
	missing := false
	for p := start / pageSize; p < (start+int64(len(buf)))/pageSize; p++ {
		missing = missing || !t.known(p)
	}
	if !missing {
		return 0, nil
	}
	if err := read(buf, start); err != nil {
		return 0, err
	}
	before := t.bytes.Load()
	err := t.fill(buf, start)
	return t.bytes.Load() - before, err
}

// fill writes those pages of buf that are not zero and not there yet, as few
// writes as that takes.
func (t *template) fill(buf []byte, off int64) error {
	missing := func(at int) bool {
		page := (off + int64(at)) / pageSize
		return !t.filled.has(page) && !t.source.isZero(page, buf[at:at+pageSize])
	}
	for at := 0; at < len(buf); {
		if !missing(at) {
			at += pageSize
			continue
		}
		end := at + pageSize
		for end < len(buf) && missing(end) {
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
	t.cached.set(off / window)
	// A word once in a while, since it wakes somebody.
	if t.told.CompareAndSwap(false, true) {
		t.grew <- struct{}{}
	}
	return nil
}

// dropSource takes what the template has out of the page cache: it is needed in
// memory once.
func (t *template) dropSource() {
	t.told.Store(false)
	windows := (t.source.size + window - 1) / window
	for next := int64(0); ; {
		first, n := t.cached.run(next, windows, windows)
		if n == 0 {
			return
		}
		for i := range n {
			t.cached.unset(first + i)
		}
		// With what was read ahead beside it.
		from, to := first*window/readAhead*readAhead, ((first+n)*window+readAhead-1)/readAhead*readAhead
		t.source.drop(from, to-from)
		next = first + n
	}
}
