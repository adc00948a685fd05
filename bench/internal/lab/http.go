package lab

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"time"
)

// Fetch asks a clone's server once, and returns the answer.
func Fetch(ctx context.Context, url string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	client := &http.Client{Timeout: time.Minute}
	defer client.CloseIdleConnections()
	resp, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("get %s: %s: %s", url, resp.Status, body)
	}
	return string(body), err
}

// Get is Fetch, again and again while the server is not there yet.
func Get(ctx context.Context, url string) (err error) {
	for range 50 {
		if _, err = Fetch(ctx, url); err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
	return err
}
