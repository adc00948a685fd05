//go:build linux

package uffd

import "structs"

// The numbers below are those of include/uapi/linux/userfaultfd.h. The request
// codes are spelled as the header computes them, because _IOWR encodes the size
// of the struct: a test compares both.
const (
	apiVersion = 0xaa

	ioctlNew        = 0x0000aa00 // _IO(0xAA, 0x00), on /dev/userfaultfd
	ioctlAPI        = 0xc018aa3f
	ioctlRegister   = 0xc020aa00
	ioctlUnregister = 0x8010aa01
	ioctlWake       = 0x8010aa02
	ioctlCopy       = 0xc028aa03
	ioctlZeroPage   = 0xc020aa04

	msgSize = 32
)

// Features of the userfaultfd of this kernel, or asked for.
type Features uint64

// Features that the page server may meet (UFFD_FEATURE_*).
const (
	FeatureEventFork     Features = 1 << 1
	FeatureEventRemap    Features = 1 << 2
	FeatureEventRemove   Features = 1 << 3
	FeatureMissingHuge   Features = 1 << 4
	FeatureMissingShmem  Features = 1 << 5
	FeatureEventUnmap    Features = 1 << 6
	FeatureThreadID      Features = 1 << 8
	FeatureExactAddress  Features = 1 << 11
	FeatureWPHugeOrShmem Features = 1 << 12
)

// Mode of a registered range (UFFDIO_REGISTER_MODE_*).
type Mode uint64

// ModeMissing reports accesses to pages that are not there. It is the only mode
// that fcvm uses.
const ModeMissing Mode = 1 << 0

// Ioctls is the set of calls that a registered range allows, a bit for each
// _UFFDIO_ number.
type Ioctls uint64

// Calls that a range may allow.
const (
	CanWake     Ioctls = 1 << 0x02
	CanCopy     Ioctls = 1 << 0x03
	CanZeroPage Ioctls = 1 << 0x04
)

type argAPI struct {
	_        structs.HostLayout
	api      uint64
	features uint64
	ioctls   uint64
}

type argRange struct {
	_     structs.HostLayout
	start uint64
	size  uint64
}

type argRegister struct {
	_      structs.HostLayout
	rng    argRange
	mode   uint64
	ioctls uint64
}

type argCopy struct {
	_    structs.HostLayout
	dst  uint64
	src  uint64
	size uint64
	mode uint64
	done int64
}

type argZeroPage struct {
	_    structs.HostLayout
	rng  argRange
	mode uint64
	done int64
}
