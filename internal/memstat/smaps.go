package memstat

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"strconv"

	"fcvm/internal/vmm"
)

// errFormat means that a file is not in the format of /proc/PID/smaps.
var errFormat = errors.New("not in the format of smaps")

// Parse reads a file in the format of /proc/PID/smaps and tells guest memory,
// which is at regions, from the rest. The kernel splits and merges mappings as
// it likes: a mapping that reaches over the edge of a region, because the
// neighbour was alike, counts where most of it lies.
func Parse(r io.Reader, regions []vmm.Region) (Usage, error) {
	var u Usage
	var m mapping
	in := false
	flush := func() {
		if in {
			u.add(m, isGuest(m, regions))
		}
	}
	sc := bufio.NewScanner(r)
	// A line holds a path at most, PATH_MAX is 4096, and \n is written as \012.
	sc.Buffer(make([]byte, 16<<10), 64<<10)
	for sc.Scan() {
		line := sc.Bytes()
		key, value, ok := bytes.Cut(line, []byte(":"))
		// "Pss:   12 kB" against "7f00-7f10 r--p 00000000 fe:00 12 /path": only a
		// header has a space before its first colon.
		if !ok || bytes.IndexByte(key, ' ') >= 0 {
			start, end, err := parseRange(line)
			if err != nil {
				return Usage{}, err
			}
			flush()
			m, in = mapping{start: start, end: end}, true
			continue
		}
		field := m.field(key)
		if field == nil {
			continue
		}
		n, err := parseKB(value)
		if err != nil {
			return Usage{}, err
		}
		if !in {
			return Usage{}, errFormat
		}
		*field += n
	}
	if err := sc.Err(); err != nil {
		return Usage{}, fmt.Errorf("read smaps: %w", err)
	}
	flush()
	u.AnonPSS = min(u.AnonPSS, u.PSS)
	return u, nil
}

// mapping is what matters of one mapping, in bytes.
type mapping struct {
	start, end                               uint64
	rss, pss, shared, private, anon, swapped int64
	// huge is of huge pages, which are in none of the above. Those of a VM are anonymous.
	huge int64
}

// field returns where the value of an smaps key belongs, or nil. The switch on
// a converted byte slice does not allocate.
func (m *mapping) field(key []byte) *int64 {
	switch string(key) {
	case "Rss":
		return &m.rss
	case "Pss":
		return &m.pss
	case "Shared_Clean", "Shared_Dirty":
		return &m.shared
	case "Private_Clean", "Private_Dirty":
		return &m.private
	case "Anonymous":
		return &m.anon
	case "Private_Hugetlb", "Shared_Hugetlb":
		return &m.huge
	case "Swap":
		return &m.swapped
	}
	return nil
}

func (u *Usage) add(m mapping, guest bool) {
	for _, n := range []*int64{&m.rss, &m.pss, &m.private, &m.anon} {
		*n += m.huge
	}
	if !guest {
		u.OverheadRSS += m.rss
		u.OverheadPSS += m.pss
		return
	}
	u.RSS += m.rss
	u.PSS += m.pss
	u.Shared += m.shared
	u.Private += m.private
	u.Anon += m.anon
	u.Swap += m.swapped
	// An anonymous page of guest memory has one owner unless KSM merged it, for a
	// VMM does not fork. So what anonymous pages leave of PSS is the file's.
	anonPSS := min(m.anon, m.pss)
	u.AnonPSS += anonPSS
	u.FilePSS += m.pss - anonPSS
}

func isGuest(m mapping, regions []vmm.Region) bool {
	var inside uint64
	for _, r := range regions {
		if r.Size <= 0 || r.Addr+uint64(r.Size) < r.Addr {
			continue
		}
		lo, hi := max(m.start, r.Addr), min(m.end, r.Addr+uint64(r.Size))
		if lo < hi {
			inside += hi - lo
		}
	}
	return inside > (m.end-m.start)/2
}

// parseRange returns the addresses in a header line.
func parseRange(line []byte) (start, end uint64, err error) {
	addrs, _, _ := bytes.Cut(line, []byte(" "))
	a, b, ok := bytes.Cut(addrs, []byte("-"))
	if !ok {
		return 0, 0, errFormat
	}
	start, err1 := strconv.ParseUint(string(a), 16, 64)
	end, err2 := strconv.ParseUint(string(b), 16, 64)
	if err1 != nil || err2 != nil || end <= start {
		return 0, 0, errFormat
	}
	return start, end, nil
}

// parseKB parses "   12 kB" into bytes.
func parseKB(b []byte) (int64, error) {
	digits, unit, ok := bytes.Cut(bytes.TrimSpace(b), []byte(" "))
	if !ok || string(unit) != "kB" {
		return 0, errFormat
	}
	n, err := strconv.ParseInt(string(digits), 10, 64)
	// No process maps more than 2^57 bytes; the bound keeps sums from overflowing.
	if err != nil || n < 0 || n > math.MaxInt64>>20 {
		return 0, errFormat
	}
	return n << 10, nil
}
