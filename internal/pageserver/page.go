//go:build linux

package pageserver

const (
	pageSize     = 4096
	hugePageSize = 2 << 20

	// window is how much of the template is filled for one fault: what the kernel
	// maps at once around a fault (fault_around_bytes, 64 KiB unless changed), so that
	// the clone takes no further fault for any of it. Measured (BenchmarkRead,
	// template/share, the first clone): 4 µs a page, 18 with a window of one page.
	window = 16 * pageSize
)
