package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"image"
	"image/png"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"fcvm/internal/api"
)

// commands are programs that scripts exec.
func commands() map[string]func() {
	return map[string]func(){
		"asuser":       asUser,
		"fcvm-log-has": logHas,
		"httpget":      httpget,
		"httpget-once": httpgetOnce,
		"identity":     identity,
		"killvmm":      killVMM,
		"rightclock":   rightClock,
		"memclones":    memclones,
		"notrace":      noTrace,
		"pngsize":      pngSize,
		"restore":      restore,
		"spares":       spares,
		"udpecho":      udpecho,
		"users":        users,
	}
}

// httpget prints the body of each URL, and fails when one is not 200 within 30 s:
// a server in a guest that just started may still refuse.
func httpget() {
	client := &http.Client{Timeout: patience(20 * time.Second)}
	for _, url := range os.Args[1:] {
		body, err := get(client, url)
		for deadline := time.Now().Add(patience(30 * time.Second)); err != nil && time.Now().Before(deadline); {
			time.Sleep(50 * time.Millisecond)
			body, err = get(client, url)
		}
		if err != nil {
			fmt.Fprintf(os.Stderr, "httpget: %v\n", err)
			os.Exit(1)
		}
		fmt.Print(body)
	}
}

func get(client *http.Client, url string) (string, error) {
	resp, err := client.Get(url)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return "", err
	}
	if resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("get %s: %s: %s", url, resp.Status, body)
	}
	return string(body), nil
}

// pngSize prints the size of the picture in a file.
func pngSize() {
	f, err := os.Open(os.Args[1])
	if err == nil {
		var img image.Image
		if img, err = png.Decode(f); err == nil {
			fmt.Println(img.Bounds().Size())
		}
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "pngsize: %v\n", err)
		os.Exit(1)
	}
}

// spares fails unless as many VMMs wait for a clone as its argument says.
func spares() {
	out, err := exec.Command("fcvm", "stats", "--json").Output()
	if err != nil {
		fmt.Fprintf(os.Stderr, "spares: %v\n", err)
		os.Exit(1)
	}
	var st api.Stats
	if err := json.Unmarshal(out, &st); err != nil || strconv.Itoa(st.Total.Spares) != os.Args[1] {
		fmt.Fprintf(os.Stderr, "spares: %d wait, not %s (%v)\n", st.Total.Spares, os.Args[1], err)
		os.Exit(1)
	}
}

// udpecho sends its second argument to the address in its first, until something
// comes back, and prints that.
func udpecho() {
	conn, err := net.Dial("udp", os.Args[1])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	buf := make([]byte, 1500)
	for range 60 {
		_, _ = conn.Write([]byte(os.Args[2]))
		_ = conn.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
		if n, err := conn.Read(buf); err == nil {
			fmt.Println(string(buf[:n]))
			return
		}
	}
	fmt.Fprintln(os.Stderr, "udpecho: no answer")
	os.Exit(1)
}

// cmds are commands that change the script's own environment or look at it.
func (l *lab) cmds() map[string]func(ts *testscript.TestScript, neg bool, args []string) {
	return map[string]func(ts *testscript.TestScript, neg bool, args []string){
		// hugepages N makes so many huge pages free while the script runs.
		"hugepages": hugePages,
		// freeport VAR… sets each variable to a free TCP port.
		"freeport": func(ts *testscript.TestScript, neg bool, args []string) {
			for _, name := range args {
				port, err := freePort()
				ts.Check(err)
				ts.Setenv(name, strconv.Itoa(port))
			}
		},
		// owndir [guest] [images] replaces a shared directory by an empty one.
		"owndir": func(ts *testscript.TestScript, neg bool, args []string) {
			for _, name := range args {
				path := filepath.Join(ts.Getenv("FCVM_DATA_DIR"), name)
				ts.Check(os.Remove(path))
				ts.Check(os.Mkdir(path, 0o700))
			}
		},
		"userdir":    l.userDir,
		"pageserver": pageServer,
		// vmms N|kill-spare: check how many VMMs run, or kill those that wait for a clone.
		"vmms": vmms,
		// supervisor kill|gone: kill -9 it, or check that none runs.
		"supervisor": l.supervisor,
		// exits CODE PROGRAM…: runs it, and wants this exit code.
		"exits": exits,
		// until SECONDS PROGRAM…: repeats a program until it succeeds.
		"until": until,
		// setstdout VAR sets a variable to the last stdout, without the newline.
		"setstdout": func(ts *testscript.TestScript, neg bool, args []string) {
			ts.Setenv(args[0], strings.TrimSpace(ts.ReadFile("stdout")))
		},
		// truncate FILE SIZE, poke FILE OFFSET BYTE: what happens to files on disks.
		"truncate": func(ts *testscript.TestScript, neg bool, args []string) {
			size, err := strconv.ParseInt(args[1], 0, 64)
			ts.Check(err)
			ts.Check(os.Truncate(args[0], size))
		},
		"poke": func(ts *testscript.TestScript, neg bool, args []string) {
			off, err := strconv.ParseInt(args[1], 0, 64)
			ts.Check(err)
			f, err := os.OpenFile(args[0], os.O_WRONLY, 0)
			ts.Check(err)
			_, err = f.WriteAt([]byte(args[2]), off)
			ts.Check(errors.Join(err, f.Close()))
		},
	}
}

func (l *lab) supervisor(ts *testscript.TestScript, neg bool, args []string) {
	var found []process
	for _, p := range marked(ts.Value(markKey{}).(string)) {
		if strings.Contains(p.cmdline, "fcvm serve") {
			found = append(found, p)
		}
	}
	switch args[0] {
	case "kill":
		if len(found) != 1 {
			ts.Fatalf("want one supervisor, found %v", found)
		}
		found[0].kill()
		for range 500 {
			if _, err := os.Stat(fmt.Sprintf("/proc/%d/exe", found[0].pid)); err != nil {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
		ts.Fatalf("supervisor %d does not die", found[0].pid)
	case "gone":
		if len(found) != 0 {
			ts.Fatalf("a supervisor runs: %v", found)
		}
	default:
		ts.Fatalf("usage: supervisor kill|gone")
	}
}

func exits(ts *testscript.TestScript, neg bool, args []string) {
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	ts.Logf("[stdout]\n%s[stderr]\n%s", ts.ReadFile("stdout"), ts.ReadFile("stderr"))
	got := 0
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		got = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	if (got == want) == neg {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

func until(ts *testscript.TestScript, neg bool, args []string) {
	seconds, err := strconv.Atoi(args[0])
	ts.Check(err)
	for deadline := time.Now().Add(patience(time.Duration(seconds) * time.Second)); ; time.Sleep(100 * time.Millisecond) {
		err := ts.Exec(args[1], args[2:]...)
		if (err == nil) != neg {
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("still failing after %v: %v", patience(time.Duration(seconds)*time.Second), err)
		}
	}
}
