package image

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

// children are what the test binary does when it is started again, as another
// process, by the name in $IMAGE_TEST_CHILD.
var children = map[string]func(args []string) error{
	// pull DIR REF prints "open", waits for a line, pulls and prints the ID.
	"pull": func(args []string) error {
		s, err := Open(args[0])
		if err != nil {
			return err
		}
		fmt.Println("open")
		if _, err := bufio.NewReader(os.Stdin).ReadString('\n'); err != nil {
			return err
		}
		img, err := s.Pull(context.Background(), args[1], PullOptions{})
		if err != nil {
			return err
		}
		fmt.Println(img.ID)
		return nil
	},
}

// process is a child of a test.
type process struct {
	cmd *exec.Cmd
	in  *os.File
	out *bufio.Scanner
}

// start starts a child and waits for its first line.
func start(t *testing.T, name string, args ...string) *process {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), "IMAGE_TEST_CHILD="+name)
	cmd.Stdin, cmd.Stderr = r, os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = r.Close()
	p := &process{cmd, w, bufio.NewScanner(out)}
	t.Cleanup(func() {
		_ = w.Close()
		_ = cmd.Process.Kill() // unless it ended
		_ = cmd.Wait()
	})
	if !p.out.Scan() {
		t.Fatalf("child %s says nothing", name)
	}
	return p
}

// Processes that pull one image at once download it once, and all get it.
func TestPullByProcesses(t *testing.T) {
	const n = 3
	var mu sync.Mutex
	downloads := map[string]int{}
	r := serve(t, blobFault(func(_ http.ResponseWriter, q *http.Request, _ http.Handler) bool {
		mu.Lock()
		defer mu.Unlock()
		downloads[filepath.Base(q.URL.Path)]++
		return false
	}))
	img := simple(t, strings.Repeat("x", 1<<20))
	ref := push(t, r, "app:v1", img)
	s := newStore(t)
	var all []*process
	for range n {
		all = append(all, start(t, "pull", s.dir, ref))
	}
	for _, p := range all {
		if _, err := p.in.WriteString("go\n"); err != nil {
			t.Fatal(err)
		}
	}
	for _, p := range all {
		if !p.out.Scan() || p.out.Text() != digest(t, img) {
			t.Errorf("a child got %q, want %s", p.out.Text(), digest(t, img))
		}
		if err := p.cmd.Wait(); err != nil {
			t.Error(err)
		}
	}
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	defer mu.Unlock()
	for _, l := range layers {
		if c := downloads[digest(t, l)]; c != 1 {
			t.Errorf("layer %s was downloaded %d times", digest(t, l), c)
		}
	}
	got, err := s.Get(ref)
	if err != nil {
		t.Fatal(err)
	}
	if content(t, got)["etc/name"] != strings.Repeat("x", 1<<20) {
		t.Error("content differs")
	}
	if l := left(t, s); len(l) != 4 { // the image's directory and its files
		t.Errorf("the store has %v", l)
	}
}

// What a killed process leaves is swept by the next Open, unless somebody else
// is at work.
func TestKilledPull(t *testing.T) {
	var on atomic.Bool
	reached := make(chan struct{}, 4)
	r := serve(t, blobFault(func(w http.ResponseWriter, q *http.Request, h http.Handler) bool {
		b := answerOf(q, h)
		if !on.Load() || strings.HasPrefix(string(b), "{") {
			return false
		}
		_, _ = w.Write(b[:len(b)/2])
		_ = http.NewResponseController(w).Flush()
		reached <- struct{}{}
		<-q.Context().Done()
		return true
	}))
	ref := push(t, r, "app:v1", simple(t, "x"))
	on.Store(true)
	s := newStore(t)
	p := start(t, "pull", s.dir, ref)
	if _, err := p.in.WriteString("go\n"); err != nil {
		t.Fatal(err)
	}
	<-reached
	openStore(t, s.dir)
	if len(left(t, s)) == 0 {
		t.Error("Open swept what a living process works on")
	}
	if err := p.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = p.cmd.Wait() // killed
	if len(left(t, s)) == 0 {
		t.Error("nothing to sweep: the test proves nothing")
	}
	on.Store(false)
	s = openStore(t, s.dir)
	for _, l := range left(t, s) {
		if !strings.HasPrefix(l, locksDir) { // the next pull takes that over
			t.Errorf("not swept: %s", l)
		}
	}
	if _, err := s.Pull(context.Background(), ref, PullOptions{}); err != nil {
		t.Errorf("pull after a killed pull: %v", err)
	}
}

func TestDiskFull(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("a small disk needs a mount, which needs root")
	}
	for _, size := range []string{"64k", "1m"} {
		dir := t.TempDir()
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
			t.Skipf("mount tmpfs: %v", err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(dir, 0); err != nil {
				t.Errorf("unmount: %v", err)
			}
		})
		r := serve(t, nil)
		noise := make([]byte, 0, 2<<20)
		for i := range cap(noise) / 8 {
			noise = fmt.Appendf(noise, "%08x", uint32(i)*2654435761)
		}
		ref := push(t, r, "app:v1", imageOf(t, "linux/amd64", tarOf(t, map[string]string{"a": string(noise)})))
		s := openStore(t, dir)
		_, err := s.Pull(context.Background(), ref, PullOptions{})
		if !errors.Is(err, ErrNoSpace) || !strings.Contains(err.Error(), dir) {
			t.Errorf("%s: error is %v", size, err)
		}
		nothingLeft(t, s)
	}
}
