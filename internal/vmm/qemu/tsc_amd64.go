package qemu

// rdtsc reads the processor's TSC. A library that does it looks at the processor
// first, whenever a program with it starts: 0.7 ms of each command, since CPUID
// in a VM is the hypervisor's to answer.
func rdtsc() uint64
