//go:build linux && amd64

// Package attach replaces the memory of an unmodified VMM, while that starts, by
// a private mapping of a file, and puts a userfaultfd on it.
//
// The VMM is started traced (ptrace(2)). At its first system call a seccomp
// filter is installed in it that stops exactly one kind of later call: the mmap
// of anonymous memory of the guest's size, over a reservation that was made
// before. At that stop its arguments are changed to name the file; when it
// returned, userfaultfd and, by pidfd_getfd(2), the way of its descriptor to this
// process are put in between. Then the VMM is let go. It sees the result that it
// asked for, and its other registers as they were.
//
// What the VMM keeps: the filter (one comparison for each system call; a second
// mmap like the one that was replaced fails with ENOSYS), no_new_privs, transparent
// huge pages switched off, and the userfaultfd. The last is on purpose: as
// long as somebody holds it, a fault that nobody answers waits; when nobody does, the
// guest would read zeros instead of its memory.
//
// Why not have the VMM map the file itself: QEMU gives memory back that came from
// a file by punching holes into that file, which all clones share. Firecracker does
// not: it maps anonymous memory over what the balloon gave back, and so takes the
// userfaultfd off it. There (Config.Own) only the userfaultfd is put in between.
package attach
