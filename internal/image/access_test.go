package image

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
)

func TestPlainHTTPOnlyLocal(t *testing.T) {
	var sent []string
	rt := plainOnlyLocal{roundTripper(func(q *http.Request) (*http.Response, error) {
		sent = append(sent, q.URL.String())
		return nil, errors.New("sent")
	})}
	for u, allowed := range map[string]bool{
		"http://localhost/v2/": true, "http://localhost:5000/v2/": true, "http://127.0.0.1:5000/": true, "http://[::1]:5000/": true,
		"https://example.com/": true, "https://10.0.0.1/": true,
		"http://example.com/": false, "http://10.0.0.1:5000/": false, "http://registry.local/": false, "http://192.168.1.1/": false,
		"http://127.0.0.2/": false, "http://localhost.example.com/": false, "http://127.0.0.1.example.com/": false,
	} {
		p, err := url.Parse(u)
		if err != nil {
			t.Fatal(err)
		}
		_, err = rt.RoundTrip(&http.Request{URL: p}) //nolint:bodyclose // there is no response
		if errors.Is(err, errPlain) == allowed {
			t.Errorf("%s: %v", u, err)
		}
	}
	if len(sent) != 6 {
		t.Errorf("sent %v", sent)
	}
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(q *http.Request) (*http.Response, error) { return f(q) }

// Credentials of docker and of podman, also of podman where docker has a
// configuration without this registry. (Docker's library remembers the first
// $HOME that it sees, so its file is given by $DOCKER_CONFIG.)
func TestCredentials(t *testing.T) {
	var want atomic.Value
	want.Store("")
	r := serve(t, func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
			if user, pass, _ := q.BasicAuth(); user+":"+pass != want.Load() && want.Load() != "" {
				w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
				w.WriteHeader(http.StatusUnauthorized)
				return
			}
			h.ServeHTTP(w, q)
		})
	})
	ref := push(t, r, "private/app:v1", simple(t, "x"))
	want.Store("me:secret")
	config := func(host string) string {
		return fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, host, base64.StdEncoding.EncodeToString([]byte("me:secret")))
	}
	for name, c := range map[string]struct {
		files map[string]string
		env   map[string]string
		ok    bool
	}{
		"none":                {nil, nil, false},
		"docker":              {map[string]string{"docker/config.json": config(r.Addr())}, map[string]string{"DOCKER_CONFIG": "docker"}, true},
		"podman's runtime":    {map[string]string{"run/containers/auth.json": config(r.Addr())}, map[string]string{"XDG_RUNTIME_DIR": "run"}, true},
		"podman's config":     {map[string]string{".config/containers/auth.json": config(r.Addr())}, nil, true},
		"podman's variable":   {map[string]string{"a.json": config(r.Addr())}, map[string]string{"REGISTRY_AUTH_FILE": "a.json"}, true},
		"docker's is another": {map[string]string{"docker/config.json": config("example.com"), "a.json": config(r.Addr())}, map[string]string{"DOCKER_CONFIG": "docker", "REGISTRY_AUTH_FILE": "a.json"}, true},
		"for another":         {map[string]string{"docker/config.json": config("example.com")}, map[string]string{"DOCKER_CONFIG": "docker"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			home := t.TempDir()
			t.Setenv("HOME", home)
			for f, data := range c.files {
				f = filepath.Join(home, f)
				if err := os.MkdirAll(filepath.Dir(f), 0o700); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(f, []byte(data), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			for k, v := range c.env {
				t.Setenv(k, filepath.Join(home, v))
			}
			s := newStore(t)
			_, err := s.Pull(context.Background(), ref, PullOptions{})
			if c.ok && err != nil {
				t.Error(err)
			}
			if !c.ok {
				if !errors.Is(err, ErrUnauthorized) {
					t.Errorf("error is %v", err)
				}
				nothingLeft(t, s)
			}
		})
	}
}
