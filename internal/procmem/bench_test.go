package procmem

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"fcvm/internal/vmm"
)

// BenchmarkDump is what a snapshot does while the VM is paused. The targets,
// device state and QMP included: 200 ms for 100 MiB of a golden VM, 30 ms for a
// clone with 4 MiB of its own, and no longer when the guest is large.
func BenchmarkDump(b *testing.B) {
	const mib = 1 << 20
	for _, c := range []struct {
		name       string
		guest, own int // MiB
		// read is how much of its template a clone maps; 0 for a golden VM.
		read int
		// twice is a Dump before, after which 1 MiB changes.
		twice bool
	}{
		{name: "golden-256MiB-100MiB-used", guest: 256, own: 100},
		{name: "clone-256MiB-4MiB-own", guest: 256, own: 4, read: 100},
		{name: "golden-256MiB-100MiB-used-twice", guest: 256, own: 100, twice: true},
		{name: "clone-2GiB-4MiB-own", guest: 2048, own: 4, read: 100},
		{name: "clone-2GiB-4MiB-own-1GiB-read", guest: 2048, own: 4, read: 1024},
	} {
		b.Run(c.name, func(b *testing.B) {
			pages := c.guest * mib / page
			path := ""
			if c.read > 0 {
				path = filepath.Join(b.TempDir(), "template")
				f, err := os.Create(path)
				if err != nil {
					b.Fatal(err)
				}
				defer f.Close()
				buf := make([]byte, mib)
				for i := range buf {
					buf[i] = byte(i) | 1
				}
				for i := range c.read {
					if _, err := f.WriteAt(buf, int64(i)*mib); err != nil {
						b.Fatal(err)
					}
				}
				if err := f.Truncate(int64(c.guest) * mib); err != nil {
					b.Fatal(err)
				}
			}
			r := start(b, pages, path)
			own := c.own * mib / page
			if c.read > 0 {
				// What was written is scattered over what was read.
				read := c.read * mib / page
				r.do(op{Do: "read", Pages: read})
				r.do(op{Do: "fill", Pages: own, Step: read / own, Byte: 1})
			} else {
				r.do(op{Do: "fill", Pages: own, Byte: 1})
			}
			regions := []vmm.Region{{Addr: r.addr, Size: r.size}}
			var res Result
			turn := byte(1)
			for b.Loop() {
				b.StopTimer()
				out, err := os.Create(filepath.Join(b.TempDir(), "mem.img"))
				if err != nil {
					b.Fatal(err)
				}
				if c.read > 0 {
					src, err := os.Open(path)
					if err != nil {
						b.Fatal(err)
					}
					if err := CloneParent(b.Context(), src, out); err != nil {
						b.Fatal(err)
					}
					src.Close()
					if err := out.Sync(); err != nil {
						b.Fatal(err)
					}
				} else if err := out.Truncate(r.size); err != nil {
					b.Fatal(err)
				}
				opt := Options{Base: c.read > 0}
				if c.twice {
					if _, err := r.Dump(b.Context(), regions, out, opt); err != nil {
						b.Fatal(err)
					}
					opt.Compare = true
					turn++
					r.do(op{Do: "fill", Pages: mib / page, Byte: turn})
				}
				b.StartTimer()
				if res, err = r.Dump(b.Context(), regions, out, opt); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				if err := os.Remove(out.Name()); err != nil {
					b.Fatal(err)
				}
				out.Close()
				b.StartTimer()
			}
			b.ReportMetric(float64(b.Elapsed().Microseconds())/1000/float64(b.N), "ms/op")
			b.ReportMetric(float64(res.Written)/mib, "MiB-written")
			if res.Private != int64(c.own)*mib {
				b.Error(fmt.Errorf("dumped %d bytes instead of %d MiB", res.Private, c.own))
			}
		})
	}
}

// BenchmarkScan is the part that grows with the guest: what does it hold?
func BenchmarkScan(b *testing.B) {
	for _, scan := range []bool{true, false} {
		b.Run(map[bool]string{true: "PAGEMAP_SCAN", false: "pagemap"}[scan], func(b *testing.B) {
			r := start(b, 2<<30/page, "")
			r.do(op{Do: "fill", Pages: 1024, Step: 512, Byte: 1})
			r.scan = r.scan && scan
			for b.Loop() {
				if n, err := r.PrivateBytes(r.addr, r.size); err != nil || n != int64(1024*page) {
					b.Fatal(n, err)
				}
			}
		})
	}
}
