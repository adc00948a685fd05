//go:build linux

package pageserver

import (
	"bytes"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"fcvm/internal/pageserver/pstest"
)

// BenchmarkRead prints what reading a page of the guest's memory costs, on
// average over 64 MiB read in order, of which nothing is zeros: for the first
// clone, and for one that comes after it.
func BenchmarkRead(b *testing.B) {
	const pages = 64 << 20 / pageSize
	for _, shape := range []pstest.Shape{pstest.Anonymous, pstest.Template} {
		for _, policy := range []Policy{PolicyCopy, PolicyShare} {
			if shape == pstest.Anonymous && policy == PolicyShare {
				continue // it does not map the template
			}
			b.Run(string(shape)+"/"+string(policy), func(b *testing.B) {
				mem := filepath.Join(b.TempDir(), "mem.img")
				if err := os.WriteFile(mem, bytes.Repeat([]byte{1}, pages*pageSize), 0o600); err != nil {
					b.Fatal(err)
				}
				var first, second float64
				for b.Loop() {
					c := Config{MemFile: mem, Policy: policy, Template: memfd(b), Log: slog.New(slog.NewTextHandler(io.Discard, nil))}
					if err := c.Template.Truncate(pages * pageSize); err != nil {
						b.Fatal(err)
					}
					f := serve(b, c)
					for _, total := range []*float64{&first, &second} {
						v := f.cloneOf(b, shape)
						r := v.do(b, pstest.Op{Kind: pstest.Read, Pages: pstest.Range(0, pages)})
						*total += float64(r.Threads[0][0].Elapsed.Nanoseconds()) / pages
						v.Kill()
					}
					if err := f.end(); err != nil {
						b.Fatal(err)
					}
				}
				b.ReportMetric(first/float64(b.N), "ns/page")
				b.ReportMetric(second/float64(b.N), "ns/page-second-clone")
				b.ReportMetric(0, "ns/op")
			})
		}
	}
}
