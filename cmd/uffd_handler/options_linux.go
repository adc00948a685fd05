package main

import (
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"fcvm/internal/pageserver"
	"fcvm/internal/workingset"
)

const usage = `uffd_handler serves the memory of microVMs that start from one snapshot.

Usage:
  uffd_handler SOCKET MEM_FILE [flags]

SOCKET is made, and a VMM connects to it: with Firecracker,
  PUT /snapshot/load {"snapshot_path": …, "mem_backend": {"backend_type": "Uffd", "backend_path": SOCKET}}
With - for SOCKET, VMMs come by the control socket only.
MEM_FILE is the snapshot's guest memory file, which must not change while it is served.

Flags:
  --policy copy|share    copy (default): every clone gets pages of its own.
                         share: clones map one template, and a page is in memory once.
  --template PATH        shared memory for policy share: a new file on tmpfs, or
                         /proc/self/fd/N; default: a memfd, whose path is logged
  --template-used        the template has what an earlier page server of the same
                         MEM_FILE put there
  --page-sums FILE       sums of the pages of MEM_FILE (a snapshot's mem.sums): a page
                         that changed ends its clone instead of being served
  --working-set FILE     pages that clones waited for: recorded for the first clones,
                         replayed for later ones, before they ask
  --id HEX               the snapshot's SHA-256, which a working set is bound to
  --fill BYTES           fill the template in the background, so many bytes a second;
                         default: 0, not at all
  --fill-max BYTES       not beyond this size of the template; default: no bound
  --control SOCKET       answers {"op":"stats"} and {"op":"shutdown"}, a line each; a
                         path, or a listening socket /proc/self/fd/N
  --idle-timeout D       ends when nobody was connected for so long, such as 30s;
                         default: never
  --allow-uid UID[,UID]  users that may connect besides root and this one
  --ready-fd N           writes "ready" to this descriptor when listening
  --no-sandbox           keep privileges and file access after the start
  --version, --help
`

// errHelp asks for the usage.
var errHelp = errors.New("help")

type options struct {
	socket, memFile   string
	policy            pageserver.Policy
	template, control string
	templateUsed      bool
	pageSums          string
	workingSet        string
	id                workingset.ID
	fill              pageserver.Fill
	idleTimeout       time.Duration
	allowUIDs         []int
	readyFD           int
	noSandbox         bool
	version           bool
}

// parse reads the command line. Flags may stand on either side of the paths.
func parse(args []string) (options, error) {
	o := options{readyFD: -1}
	fs := flag.NewFlagSet("uffd_handler", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	policy := fs.String("policy", string(pageserver.PolicyCopy), "")
	fs.StringVar(&o.template, "template", "", "")
	fs.BoolVar(&o.templateUsed, "template-used", false, "")
	fs.StringVar(&o.pageSums, "page-sums", "", "")
	fs.StringVar(&o.workingSet, "working-set", "", "")
	fs.Int64Var(&o.fill.BytesPerSecond, "fill", 0, "")
	fs.Int64Var(&o.fill.MaxBytes, "fill-max", 0, "")
	fs.BoolVar(&o.noSandbox, "no-sandbox", false, "")
	fs.Func("id", "", func(s string) error {
		b, err := hex.DecodeString(s)
		if err != nil || len(b) != len(o.id) {
			return errors.New("want 64 hexadecimal digits")
		}
		o.id = workingset.ID(b)
		return nil
	})
	fs.StringVar(&o.control, "control", "", "")
	fs.DurationVar(&o.idleTimeout, "idle-timeout", 0, "")
	fs.IntVar(&o.readyFD, "ready-fd", -1, "")
	fs.BoolVar(&o.version, "version", false, "")
	fs.Func("allow-uid", "", func(s string) error {
		for u := range strings.SplitSeq(s, ",") {
			uid, err := strconv.ParseUint(u, 10, 32)
			if err != nil {
				return errors.New("want numbers of users")
			}
			o.allowUIDs = append(o.allowUIDs, int(uid))
		}
		return nil
	})
	var paths []string
	for {
		if err := fs.Parse(args); err != nil {
			if errors.Is(err, flag.ErrHelp) {
				return o, errHelp
			}
			return o, err
		}
		if args = fs.Args(); len(args) == 0 {
			break
		}
		paths, args = append(paths, args[0]), args[1:]
	}
	if o.version {
		return o, nil
	}
	if len(paths) != 2 {
		return o, fmt.Errorf("want SOCKET and MEM_FILE, got %d paths", len(paths))
	}
	o.socket, o.memFile = paths[0], paths[1]
	o.policy = pageserver.Policy(*policy)
	if o.policy != pageserver.PolicyCopy && o.policy != pageserver.PolicyShare {
		return o, fmt.Errorf("unknown policy %q, want copy or share", *policy)
	}
	if o.socket == "-" && o.control == "" {
		return o, errors.New("without SOCKET nobody can hand over a VMM, unless there is --control")
	}
	if o.fill.BytesPerSecond < 0 || o.fill.MaxBytes < 0 {
		return o, errors.New("--fill and --fill-max want numbers of bytes")
	}
	if o.idleTimeout < 0 {
		return o, fmt.Errorf("idle timeout %v is negative", o.idleTimeout)
	}
	return o, nil
}
