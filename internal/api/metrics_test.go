package api

import (
	"context"
	"io"
	"log/slog"
	"net/http"
	"testing"
)

func (f *fakeBackend) Metrics(context.Context) ([]byte, error) { return []byte("m 1\n"), f.err }

func TestMetricsByTheSocket(t *testing.T) {
	b := &fakeBackend{}
	c := serve(t, b)
	got, err := c.Metrics(t.Context())
	if err != nil || string(got) != "m 1\n" {
		t.Errorf("%q, %v", got, err)
	}
	b.err = &Error{Code: CodeInternal, Message: "no"}
	if _, err := c.Metrics(t.Context()); err == nil || err.Error() != "no" {
		t.Error(err)
	}
}

func TestMetricsByTCP(t *testing.T) {
	l, err := ListenMetrics(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- ServeMetrics(ctx, l, &fakeBackend{}, slog.New(slog.DiscardHandler)) }()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	get := func(method, path string) (int, string, string) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), method, "http://"+l.Addr().String()+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, resp.Header.Get("Content-Type"), string(body)
	}
	if code, typ, body := get(http.MethodGet, "/metrics"); code != 200 || typ != metricsType || body != "m 1\n" {
		t.Errorf("%d, %q, %q", code, typ, body)
	}
	// Nothing of the API is there: who connects by TCP is nobody in particular.
	if code, _, _ := get(http.MethodGet, pathVMs); code != http.StatusNotFound {
		t.Errorf("GET %s: %d", pathVMs, code)
	}
	if code, _, _ := get(http.MethodPost, "/metrics"); code != http.StatusMethodNotAllowed {
		t.Errorf("POST: %d", code)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestMetricsStayOnTheLoopback(t *testing.T) {
	for _, address := range []string{"", "9464", ":9464", "0.0.0.0:9464", "[::]:9464", "192.0.2.1:9464", "example.org:9464", "127.0.0.1", "127.0.0.1:http:80"} {
		if l, err := ListenMetrics(t.Context(), address); err == nil {
			l.Close()
			t.Errorf("listens on %q", address)
		} else if e := toError(err); e.Code != CodeInvalid {
			t.Errorf("%q: %v", address, err)
		}
	}
	for _, address := range []string{"127.0.0.1:0", "localhost:0", "127.9.9.9:0"} {
		l, err := ListenMetrics(t.Context(), address)
		if err != nil {
			t.Errorf("%q: %v", address, err)
			continue
		}
		l.Close()
	}
}
