package fcapi

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Version of Firecracker. A version before a release ("1.17.0-dev") counts as
// that release: it is what people build from its branch.
type Version struct{ Major, Minor, Patch int }

// Oldest is the oldest version that fcvm works with. It is the first one that
// knows huge pages, and all that the requests here hold without a [Feature].
var Oldest = Version{1, 7, 0}

// ParseVersion reads what GET /version and `firecracker --version` tell, such as
// "1.16.1" or "v1.17.0-dev".
func ParseVersion(s string) (Version, error) {
	core, _, _ := strings.Cut(strings.TrimPrefix(s, "v"), "-")
	core, _, _ = strings.Cut(core, "+")
	parts := strings.Split(core, ".")
	if len(parts) != 3 {
		return Version{}, fmt.Errorf("parse version %.40q: want three numbers", s)
	}
	var n [3]int
	for i, p := range parts {
		v, err := strconv.ParseUint(p, 10, 16)
		if err != nil {
			return Version{}, fmt.Errorf("parse version %.40q: want three numbers", s)
		}
		n[i] = int(v)
	}
	return Version{n[0], n[1], n[2]}, nil
}

// String implements [fmt.Stringer].
func (v Version) String() string { return fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Patch) }

// Compare orders versions, as [strings.Compare] does.
func (v Version) Compare(w Version) int {
	return slices.Compare([]int{v.Major, v.Minor, v.Patch}, []int{w.Major, w.Minor, w.Patch})
}

// LowMemory is how much of a guest's memory, in bytes, lies below the hole for devices that
// ends at 4 GiB; the rest is above it, in a mapping of its own. Of x86-64: MEM_32BIT_GAP_SIZE,
// later MMIO32_MEM_SIZE, in Firecracker's source.
func (v Version) LowMemory() int64 {
	if v.Compare(Version{1, 13, 0}) < 0 {
		return 4<<30 - 768<<20
	}
	return 3 << 30
}

// Feature is what not every supported version can do. Firecracker refuses a
// request that holds a field it does not know, so fields wait for their version.
type Feature int

// The features, by the field or path that brings them.
const (
	// NetworkOverrides is network_overrides of a load: the clone's TAP has
	// another name than the golden VM's.
	NetworkOverrides Feature = iota
	// DirtyPagesOnLoad is track_dirty_pages of a load. Before, the same was named
	// enable_diff_snapshots, which [Client.LoadSnapshot] then uses.
	DirtyPagesOnLoad
	// FreePageReporting is free_page_reporting of the balloon: the guest gives
	// back by itself what it does not use.
	FreePageReporting
	// FreePageHinting is free_page_hinting of the balloon: it does so when asked.
	FreePageHinting
	// ClockRealtime is clock_realtime of a load: the guest's kvm-clock advances by
	// the time since the snapshot.
	ClockRealtime
	// VsockOverride is vsock_override of a load: the clone's vsock has another
	// socket than the golden VM's.
	VsockOverride
	// MTU is mtu of a network interface.
	MTU

	features // how many there are
)

// since lists the first version of each branch that can do it, ascending; every
// version after the last can. Read from the struct definitions of each release:
// clock_realtime was brought to two older branches as well.
func (f Feature) since() (name string, first []Version) {
	switch f {
	case NetworkOverrides:
		return "network_overrides", []Version{{1, 12, 0}}
	case DirtyPagesOnLoad:
		return "track_dirty_pages", []Version{{1, 13, 0}}
	case FreePageReporting:
		return "free_page_reporting", []Version{{1, 14, 0}}
	case FreePageHinting:
		return "free_page_hinting", []Version{{1, 14, 0}}
	case ClockRealtime:
		return "clock_realtime", []Version{{1, 14, 4}, {1, 15, 1}, {1, 16, 0}}
	case VsockOverride:
		return "vsock_override", []Version{{1, 16, 0}}
	case MTU:
		return "mtu", []Version{{1, 16, 0}}
	}
	return "Feature(" + strconv.Itoa(int(f)) + ")", nil
}

// String implements [fmt.Stringer].
func (f Feature) String() string {
	name, _ := f.since()
	return name
}

// Has tells whether v can do f.
func (v Version) Has(f Feature) bool {
	_, first := f.since()
	for i, from := range first {
		if i == len(first)-1 {
			return v.Compare(from) >= 0
		}
		if v.Major == from.Major && v.Minor == from.Minor {
			return v.Patch >= from.Patch
		}
	}
	return false
}

// need is nil, or an error that wraps [ErrUnsupported] when one of the features
// that are used is beyond v.
func (v Version) need(used map[Feature]bool) error {
	for f := range features {
		if used[f] && !v.Has(f) {
			_, first := f.since()
			return fmt.Errorf("%w: %s needs Firecracker %s, this is %s", ErrUnsupported, f, first[0], v)
		}
	}
	return nil
}

// ResumeStopsVsock tells of a fault of 1.16.0 and 1.16.1 (Vsock::kick): whenever a VM
// is resumed, its vsock device waits until the guest has confirmed a reset, of which the
// guest is told only when a snapshot was created in the pause. Without one, and when a VM that
// runs is resumed, no host ever reaches the guest again. Later versions ask whether it was told.
func (v Version) ResumeStopsVsock() bool { return v.Major == 1 && v.Minor == 16 }
