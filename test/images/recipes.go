package images

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

const searchPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// App is a user of the busybox image who is not root.
const (
	AppUser = "app"
	AppUID  = 1000
)

const passwd = `root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/usr/sbin:/bin/false
www-data:x:33:33:www-data:/var/www:/bin/false
nginx:x:101:101:nginx:/nonexistent:/bin/false
app:x:1000:1000:app:/home/app:/bin/sh
nobody:x:65534:65534:nobody:/nonexistent:/bin/false
`

const group = `root:x:0:
daemon:x:1:
staff:x:50:app
www-data:x:33:
nginx:x:101:
app:x:1000:
nogroup:x:65534:
`

// baseFiles are what Debian's base-files package would make.
func baseFiles() []File {
	return []File{
		{Path: "/bin", Dir: true}, {Path: "/sbin", Dir: true}, {Path: "/usr", Dir: true},
		{Path: "/usr/bin", Dir: true}, {Path: "/usr/sbin", Dir: true}, {Path: "/etc", Dir: true},
		{Path: "/dev", Dir: true}, {Path: "/proc", Dir: true}, {Path: "/sys", Dir: true},
		{Path: "/run", Dir: true}, {Path: "/var", Dir: true}, {Path: "/var/log", Dir: true},
		{Path: "/var/run", Link: "/run"}, {Path: "/home", Dir: true},
		{Path: "/root", Dir: true, Mode: 0o700},
		{Path: "/tmp", Dir: true, Mode: 0o1777},
		{Path: "/home/" + AppUser, Dir: true, UID: AppUID, GID: AppUID},
		{Path: "/etc/passwd", Data: []byte(passwd)},
		{Path: "/etc/group", Data: []byte(group)},
		{Path: "/etc/hosts", Data: []byte("127.0.0.1 localhost\n")},
		{Path: "/etc/nsswitch.conf", Data: []byte("passwd: files\ngroup: files\nhosts: files dns\n")},
	}
}

func buildBusybox(ctx context.Context, c *cache) (v1.Image, error) {
	l := newTarLayer()
	if err := addBusybox(ctx, c, l); err != nil {
		return nil, err
	}
	return assemble(v1.Config{
		Env: []string{searchPath}, Cmd: []string{"sh"},
	}, l)
}

// addBusybox adds the base files and a shell with its tools.
func addBusybox(ctx context.Context, c *cache, l *tarLayer) error {
	if err := c.unpack(ctx, l, "busybox-static"); err != nil {
		return err
	}
	for _, f := range baseFiles() {
		if err := l.add(f); err != nil {
			return err
		}
	}
	const path = "/bin/busybox"
	prog, ok := l.entries["bin/busybox"]
	if !ok { // from Debian 13 on
		if prog, ok = l.entries["usr/bin/busybox"]; !ok {
			return fmt.Errorf("build busybox: no program in the package")
		}
		delete(l.entries, "usr/bin/busybox")
		prog.h.Name = "bin/busybox"
		l.entries["bin/busybox"] = prog
	}
	names, err := applets(ctx, prog.data)
	if err != nil {
		return err
	}
	for _, n := range names {
		if n == "linuxrc" || n == "sbin/init" || l.has(n) {
			continue
		}
		if err := l.add(File{Path: "/" + n, Link: path}); err != nil {
			return err
		}
	}
	return nil
}

// applets asks busybox which programs it is.
func applets(ctx context.Context, prog []byte) ([]string, error) {
	dir, err := os.MkdirTemp("", "fcvm-busybox-")
	if err != nil {
		return nil, fmt.Errorf("run busybox: %w", err)
	}
	defer func() { _ = os.RemoveAll(dir) }()
	path := filepath.Join(dir, "busybox")
	if err := os.WriteFile(path, prog, 0o700); err != nil {
		return nil, fmt.Errorf("run busybox: %w", err)
	}
	out, err := exec.CommandContext(ctx, path, "--list-full").Output()
	if err != nil {
		return nil, fmt.Errorf("run busybox: %w", err)
	}
	return strings.Fields(string(bytes.TrimSpace(out))), nil
}

const nginxConf = `user nginx;
worker_processes auto;
error_log /var/log/nginx/error.log notice;
pid /run/nginx.pid;
events { worker_connections 1024; }
http {
    include /etc/nginx/mime.types;
    default_type application/octet-stream;
    access_log /var/log/nginx/access.log;
    sendfile on;
    keepalive_timeout 65;
    include /etc/nginx/conf.d/*.conf;
}
`

const nginxSite = `server {
    listen 80;
    server_name localhost;
    location / {
        root /usr/share/nginx/html;
        index index.html;
    }
}
`

const nginxIndex = `<!DOCTYPE html>
<html>
<head><title>Welcome to nginx!</title></head>
<body>
<h1>Welcome to nginx!</h1>
<p>This page comes out of a microVM.</p>
</body>
</html>
`

// buildNginx makes an image like docker's official one, of three layers; the
// last one hides some of the second.
func buildNginx(ctx context.Context, c *cache) (v1.Image, error) {
	base, server, site := newTarLayer(), newTarLayer(), newTarLayer()
	if err := addBusybox(ctx, c, base); err != nil {
		return nil, err
	}
	if err := c.unpack(ctx, base, "libc6", "libgcc-s1", "libcrypt1", "libpcre2-8-0", "libssl3|libssl3t64", "zlib1g"); err != nil {
		return nil, err
	}
	if err := c.unpack(ctx, server, "nginx", "nginx-common"); err != nil {
		return nil, err
	}
	for _, f := range []File{
		{Path: "/etc/nginx/nginx.conf", Data: []byte(nginxConf)},
		{Path: "/etc/nginx/conf.d/default.conf", Data: []byte(nginxSite)},
		{Path: "/etc/nginx/sites-available", Whiteout: true},
		{Path: "/etc/nginx/sites-enabled", Whiteout: true},
		{Path: "/usr/share/nginx/html/index.html", Data: []byte(nginxIndex)},
		{Path: "/var/lib/nginx", Dir: true, UID: 101, GID: 101},
		{Path: "/var/log/nginx", Dir: true},
		{Path: "/var/log/nginx/access.log", Link: "/dev/stdout"},
		{Path: "/var/log/nginx/error.log", Link: "/dev/stderr"},
	} {
		if err := site.add(f); err != nil {
			return nil, err
		}
	}
	return assemble(v1.Config{
		Env:          []string{searchPath},
		Cmd:          []string{"nginx", "-g", "daemon off;"},
		ExposedPorts: map[string]struct{}{"80/tcp": {}},
		StopSignal:   "SIGQUIT",
	}, base, server, site)
}
