//go:build linux

package pstest

// Scenarios returns all of them, in the order in which they are best run: what
// comes first is what the later ones build on.
func Scenarios() []Scenario {
	return []Scenario{
		{Name: "WholeSnapshot", run: wholeSnapshot,
			About: "Several clones read all of their memory, ascending and in random order: each page is the snapshot's."},
		{Name: "Regions", run: regions,
			About: "The memory file is mapped in several regions, in any order of addresses, with parts left out: each page is where it belongs."},
		{Name: "SamePage", run: samePage,
			About: "Many threads fault on the same page at once, reading, writing, or both: all go on, and no write is lost."},
		{Name: "Neighbours", run: neighbours,
			About: "Many threads fault on neighbouring pages at once, reading and writing: all go on, with each its own page."},
		{Name: "CrossTalk", run: crossTalk,
			About: "Clones write to all their pages at once: nobody sees another's, and a later clone sees the snapshot."},
		{Name: "RemovedPages", run: removedPages,
			About: "Pages are given back untouched, read, and written to: zeros are there, never what was there before."},
		{Name: "RemoveBehindFaults", run: removeBehindFaults,
			About: "Pages are given back while faults on them are queued: whatever those get, the pages are zeros once they were given back."},
		{Name: "FaultsDuringRemove", run: faultsDuringRemove,
			About: "Faults arrive while pages elsewhere are being given back, when the kernel lets no page be placed: all are answered."},
		{Name: "RemoveStorm", run: removeStorm,
			About: "Pages are given back one by one without a pause, until other threads have got theirs: they do get them."},
		{Name: "RemovedNeighbour", run: removedNeighbour,
			About: "A page that was given back faults again, and before its answer comes, a neighbour's answer maps it: the thread that waits goes on."},
		{Name: "RemoveBeforeReplay", run: removeBeforeReplay,
			About: "Clones give pages back, and write to some, while the page server brings pages that earlier clones needed: those stay zeros, and what was written stays."},
		{Name: "TemplateWhole", run: templateWhole, Only: Template,
			About: "Whenever the page server is stopped, what other clones can map of the template are whole pages of the snapshot."},
		{Name: "FaultsBeforeHandshake", run: faultsBeforeHandshake,
			About: "Threads fault, and give pages back, before the page server has heard of the VMM: all go on when it has."},
		{Name: "SlowHandshake", run: slowHandshake,
			About: "A handshake comes byte by byte, with its descriptor first or last: others are served meanwhile, and the VMM afterwards."},
		{Name: "LongHandshake", run: longHandshake,
			About: "A handshake of exactly 64 KiB is served; one that does not end there is refused."},
		{Name: "BadHandshakes", run: badHandshakes,
			About: "Handshakes that are truncated, malformed, or come with no, wrong or too many descriptors are refused, and others are served on."},
		{Name: "SilentConnections", run: silentConnections,
			About: "VMMs connect and say nothing: others are served."},
		{Name: "ExitInFault", run: exitInFault,
			About: "VMMs exit, or are killed, in the middle of a storm of faults: others are served on."},
		{Name: "Teardown", run: teardown,
			About: "VMMs end without fork: they unmap their memory, close the connection, or do neither: others are served on."},
		{Name: "ManySessions", run: manySessions,
			About: "A hundred clones at once: each sees its snapshot."},
		{Name: "HugePages", run: hugePages, Only: Anonymous,
			About: "Memory of 2 MiB pages is read, written and given back."},
	}
}
