package guest

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// metaPackages are packages that depend on the newest kernel for VMs: Debian's,
// then Ubuntu's.
var metaPackages = []string{"linux-image-cloud-amd64", "linux-image-virtual"}

func (o SetupOptions) metaPackages() []string {
	if o.Package != "" {
		return []string{o.Package}
	}
	return metaPackages
}

// errNoApt means that apt is not there, or knows no kernel.
var errNoApt = errors.New("apt has no kernel package")

// downloadKernel puts the packages of a kernel into dir, the one with the kernel
// first.
func downloadKernel(ctx context.Context, o SetupOptions, dir string) ([]string, error) {
	if o.Mirror == "" {
		debs, err := downloadApt(ctx, o, dir)
		if !errors.Is(err, errNoApt) {
			return debs, err
		}
	}
	deb, err := downloadMirror(ctx, o, dir)
	if err != nil {
		return nil, err
	}
	return []string{deb}, nil
}

// downloadApt lets apt find, download and check the package: it needs no root,
// and knows the proxies and mirrors of this machine.
func downloadApt(ctx context.Context, o SetupOptions, dir string) ([]string, error) {
	for _, tool := range []string{"apt-get", "apt-cache"} {
		if _, err := exec.LookPath(tool); err != nil {
			return nil, errNoApt
		}
	}
	for _, meta := range o.metaPackages() {
		deps, err := aptDepends(ctx, meta)
		if err != nil {
			return nil, err
		}
		image := firstWithPrefix(deps, "linux-image-")
		if image == "" {
			continue
		}
		names := []string{image}
		// Ubuntu keeps the modules in a package of their own.
		deps, err = aptDepends(ctx, image)
		if err != nil {
			return nil, err
		}
		if m := firstWithPrefix(deps, "linux-modules-"); m != "" {
			names = append(names, m)
		}
		var debs []string
		for _, name := range names {
			deb, err := aptDownload(ctx, name, dir, o.Progress)
			if err != nil {
				return nil, err
			}
			debs = append(debs, deb)
		}
		return debs, nil
	}
	return nil, errNoApt
}

// aptDepends returns the names that a package depends on, none when apt does not
// know the package.
func aptDepends(ctx context.Context, name string) ([]string, error) {
	cmd := exec.CommandContext(ctx, "apt-cache", "show", "--no-all-versions", name)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	out, err := cmd.Output()
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if err != nil {
		return nil, nil //nolint:nilerr // apt-cache fails when it does not know the package
	}
	stanzas, err := parseStanzas(bytes.NewReader(out), func(string) bool { return true })
	if err != nil {
		return nil, fmt.Errorf("read apt's answer: %w", err)
	}
	return dependencies(stanzas[name]["Depends"]), nil
}

func aptDownload(ctx context.Context, name, dir string, progress func(string, int64, int64)) (string, error) {
	stage := "download " + name
	progress(stage, 0, 0)
	before, err := filepath.Glob(filepath.Join(dir, "*.deb"))
	if err != nil {
		return "", err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return "", err
	}
	defer r.Close()
	// As root, apt downloads as the user _apt, who cannot write into our
	// directory; it warns and goes on as root.
	cmd := exec.CommandContext(ctx, "apt-get", "-qq", "-o", "APT::Status-Fd=3", "-o", "APT::Sandbox::User=root", "download", name)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	cmd.Dir = dir
	cmd.ExtraFiles = []*os.File{w}
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	err = cmd.Start()
	w.Close()
	if err != nil {
		return "", fmt.Errorf("run apt-get: %w", err)
	}
	for lines := bufio.NewScanner(r); lines.Scan(); {
		// dlstatus:1:20.3418:Retrieving file 1 of 1 …
		if f := strings.SplitN(lines.Text(), ":", 4); len(f) > 2 && f[0] == "dlstatus" {
			if percent, err := strconv.ParseFloat(f[2], 64); err == nil {
				progress(stage, int64(percent), 100)
			}
		}
	}
	if err := cmd.Wait(); err != nil {
		if ctx.Err() != nil {
			return "", context.Cause(ctx)
		}
		return "", fmt.Errorf("download %s with apt-get: %w: %s; try `apt-get update`, or give a package with --kernel-deb", name, err, lastLine(said.String()))
	}
	after, err := filepath.Glob(filepath.Join(dir, "*.deb"))
	if err != nil {
		return "", err
	}
	for _, f := range after {
		if !slices.Contains(before, f) {
			return f, nil
		}
	}
	return "", fmt.Errorf("download %s with apt-get: it stored no file", name)
}

// parseStanzas reads Debian control data: "Field: value" lines, stanzas parted
// by empty lines. It keeps the stanzas of the packages that keep wants, by name; of
// several of one name the first.
func parseStanzas(r io.Reader, keep func(name string) bool) (map[string]map[string]string, error) {
	all := map[string]map[string]string{}
	cur := map[string]string{}
	flush := func() {
		if name := cur["Package"]; name != "" && keep(name) && all[name] == nil {
			all[name] = cur
		}
		cur = map[string]string{}
	}
	s := bufio.NewScanner(r)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		line := s.Text()
		if line == "" {
			flush()
			continue
		}
		if line[0] == ' ' || line[0] == '\t' {
			continue // only long descriptions and lists go on
		}
		if k, v, ok := strings.Cut(line, ":"); ok {
			cur[k] = strings.TrimSpace(v)
		}
	}
	flush()
	return all, s.Err()
}

// dependencies returns the names in a Depends field, without versions; of
// alternatives the first.
func dependencies(field string) []string {
	var names []string
	for _, part := range strings.Split(field, ",") {
		part, _, _ = strings.Cut(part, "|")
		if f := strings.Fields(part); len(f) > 0 {
			name, _, _ := strings.Cut(f[0], ":")
			names = append(names, name)
		}
	}
	return names
}

func firstWithPrefix(names []string, prefix string) string {
	for _, n := range names {
		if strings.HasPrefix(n, prefix) {
			return n
		}
	}
	return ""
}

func lastLine(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return lines[len(lines)-1]
}
