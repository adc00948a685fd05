package supervisor

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"math/big"
	"regexp"
	"slices"
	"strings"

	"fcvm/internal/api"
)

var (
	// namePattern is docker's rule, with a host name's length: a VM's name is its
	// host name.
	namePattern = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]*$`)
	idPattern   = regexp.MustCompile(`^[0-9a-f]{12}$`)
)

const maxName = 63

func checkName(name string) error {
	if len(name) > maxName || !namePattern.MatchString(name) {
		return invalid("malformed name %q: use 1 to %d letters, digits, _, . and -, starting with a letter or digit", name, maxName)
	}
	return nil
}

func randomHex(n int) string {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails (crypto/rand)
	return hex.EncodeToString(b)
}

// add makes a machine with an ID and a name of its own and puts it into the
// tables, in the state "creating". An empty name means a generated one. take, where
// it is not nil, is called when nothing can fail any more, and returns a VMM that was
// started ahead, or nil.
func (s *Supervisor) add(name string, rec record, take func() *spare) (*machine, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if name == "" {
		name = s.freeName()
	} else {
		if err := checkName(name); err != nil {
			return nil, err
		}
		if other := s.names[name]; other != nil {
			return nil, &api.Error{
				Code:    api.CodeConflict,
				Message: fmt.Sprintf("the name %s is taken by VM %s", name, other.id),
				Hint:    fmt.Sprintf("`fcvm rm %s` removes that one (-f if it runs), or choose another name", name),
			}
		}
	}
	id := randomHex(6)
	for s.byID[id] != nil {
		id = randomHex(6)
	}
	rec.VM.ID, rec.VM.Name, rec.VM.State = id, name, api.StateCreating
	var ahead *spare
	if take != nil {
		if ahead = take(); ahead != nil {
			rec.VM.ID = ahead.id
		}
	}
	m := newMachine(s, rec)
	m.spare = ahead
	s.byID[m.id], s.names[name] = m, m
	s.stir()
	return m, nil
}

// freeName generates a name. The caller holds s.mu.
func (s *Supervisor) freeName() string {
	for try := 0; ; try++ {
		name := pick(adjectives) + "-" + pick(animals)
		if try > 10 {
			name += "-" + randomHex(2)
		}
		if s.names[name] == nil {
			return name
		}
	}
}

func pick(words []string) string {
	n, err := rand.Int(rand.Reader, big.NewInt(int64(len(words))))
	if err != nil {
		return words[0]
	}
	return words[n.Int64()]
}

// forget takes a machine out of the tables.
func (s *Supervisor) forget(m *machine) {
	s.mu.Lock()
	delete(s.byID, m.id)
	if s.names[m.name] == m {
		delete(s.names, m.name)
	}
	s.mu.Unlock()
	s.stir()
}

// machines returns all machines, the oldest first.
func (s *Supervisor) machines() []*machine {
	s.mu.Lock()
	all := make([]*machine, 0, len(s.byID))
	for _, m := range s.byID {
		all = append(all, m)
	}
	s.mu.Unlock()
	slices.SortFunc(all, func(a, b *machine) int {
		if c := a.created.Compare(b.created); c != 0 {
			return c
		}
		return strings.Compare(a.name, b.name)
	})
	return all
}

// find looks a VM up by name, ID, or the unambiguous beginning of an ID.
func (s *Supervisor) find(name string) (*machine, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if m := s.names[name]; m != nil {
		return m, nil
	}
	if m := s.byID[name]; m != nil {
		return m, nil
	}
	var found *machine
	if name != "" {
		for id, m := range s.byID {
			if !strings.HasPrefix(id, name) {
				continue
			}
			if found != nil {
				return nil, invalid("%s is the beginning of several IDs", name)
			}
			found = m
		}
	}
	if found == nil {
		return nil, &api.Error{Code: api.CodeNotFound, Message: "no such VM: " + name, Hint: "`fcvm ls -a` lists them"}
	}
	return found, nil
}

// Words for names, short and easy to tell apart on the phone.
var adjectives = []string{
	"able", "agile", "amber", "ample", "bold", "brave", "brief", "bright", "brisk", "calm", "candid", "clear",
	"clever", "cosy", "crisp", "daring", "deft", "eager", "early", "exact", "fair", "fancy", "fast", "fine",
	"firm", "fond", "frank", "fresh", "gentle", "giddy", "glad", "golden", "grand", "happy", "hardy", "honest",
	"humble", "jolly", "keen", "kind", "late", "light", "lively", "lucid", "lucky", "lunar", "mellow", "merry",
	"mild", "modest", "neat", "nimble", "noble", "odd", "patient", "plain", "polite", "prime", "proud", "quick",
	"quiet", "rapid", "ready", "rosy", "royal", "sharp", "shy", "silent", "smart", "smooth", "snug", "solar",
	"solid", "sound", "spry", "steady", "still", "stout", "sunny", "swift", "tame", "tidy", "tiny", "tough",
	"upbeat", "urban", "vivid", "warm", "wise", "witty", "young", "zesty",
}

var animals = []string{
	"adder", "albatross", "antelope", "badger", "bat", "bear", "beaver", "bee", "bison", "bobcat", "bream",
	"buzzard", "camel", "carp", "cheetah", "civet", "cobra", "cod", "condor", "coot", "crab", "crane", "cricket",
	"crow", "deer", "dingo", "dolphin", "dove", "duck", "eagle", "egret", "eland", "elk", "emu", "falcon",
	"ferret", "finch", "fox", "frog", "gecko", "gibbon", "goat", "goose", "grouse", "gull", "hare", "hawk",
	"heron", "hornet", "horse", "ibex", "ibis", "jackal", "jay", "kestrel", "kite", "koala", "lark", "lemur",
	"lion", "lizard", "llama", "lynx", "magpie", "marten", "mole", "moose", "moth", "mule", "newt", "ocelot",
	"orca", "oryx", "otter", "owl", "ox", "panda", "parrot", "pelican", "perch", "pike", "puffin", "puma",
	"quail", "rabbit", "raven", "robin", "salmon", "seal", "shrew", "skink", "snipe", "squid", "stoat", "stork",
	"swan", "tapir", "tern", "tiger", "toad", "trout", "turtle", "viper", "vole", "walrus", "wasp", "weasel",
	"whale", "wolf", "wombat", "wren", "yak", "zebra",
}
