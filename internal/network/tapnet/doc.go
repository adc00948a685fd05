// Package tapnet gives a VMM that is started a network namespace of its own with a
// TAP in it, and a process that is the network behind that TAP.
//
//	supervisor ── control socket ── fcvm vm-network serve     in the host's network namespace
//	                                     │ packet socket       (package netstack)
//	                                   fcvm0, a TAP           in the VMM's
//	                                     │
//	                                    VMM ── guest
//
// The VMM's process begins as `fcvm vm-network enter`, in the new namespace (and a new user
// namespace, for others than root). It makes the TAP, hands a packet socket on it to the
// serving process, and executes the VMM: pid, descriptors and environment stay. So every VM finds the
// same device name, the namespace ends with the VMM, and nothing is left on the host, whatever dies.
//
// The serving process outlives the supervisor, as the VMM does, and ends with the VMM, of which it
// holds a pidfd. Should it die itself, the VM runs on without a network.
package tapnet
