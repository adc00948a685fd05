package testreport

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
)

// row is what entries are counted by.
type row struct {
	suite, engine, version, accel string
	lab                           bool
}

func (r row) String() string {
	accel := strings.ToUpper(r.accel)
	if r.lab {
		accel += ", in the lab"
	}
	names := map[string]string{"qemu": "QEMU", "firecracker": "Firecracker"}
	return fmt.Sprintf("| %s | %s %s | %s |", r.suite, cmp.Or(names[r.engine], r.engine), r.version, accel)
}

// Table prints the entries, counted, in Markdown, and then the notes. A test that is
// there twice counts once, with its last outcome.
func Table(w io.Writer, all []Entry) error {
	outcomes := map[row]map[string]Outcome{}
	vms, seconds := map[row]int{}, map[row]float64{}
	var notes []string
	for _, e := range all {
		if e.Note != "" {
			notes = append(notes, e.Note)
			continue
		}
		r := row{e.Suite, e.Engine, e.Version, e.Accel, e.Lab}
		if outcomes[r] == nil {
			outcomes[r] = map[string]Outcome{}
		}
		outcomes[r][e.Test] = e.Outcome
		vms[r] += e.VMs
		seconds[r] += e.Seconds
	}
	var b strings.Builder
	b.WriteString("| suite | engine | accelerator | tests | VMs | minutes |\n| --- | --- | --- | --- | ---: | ---: |\n")
	rows := slices.SortedFunc(maps.Keys(outcomes), func(a, b row) int { return strings.Compare(a.String(), b.String()) })
	for _, r := range rows {
		fmt.Fprintf(&b, "%s %s | %d | %.1f |\n", r, count(outcomes[r]), vms[r], seconds[r]/60)
	}
	for _, n := range notes {
		fmt.Fprintf(&b, "\n%s\n", n)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func count(outcomes map[string]Outcome) string {
	n := map[Outcome]int{}
	for _, o := range outcomes {
		n[o]++
	}
	var parts []string
	for _, o := range []Outcome{Passed, Skipped, Failed} {
		if n[o] > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", n[o], o))
		}
	}
	return strings.Join(parts, ", ")
}
