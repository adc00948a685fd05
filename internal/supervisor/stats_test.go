package supervisor

import (
	"strings"
	"testing"

	"fcvm/internal/api"
	"fcvm/internal/memstat"
)

func TestHint(t *testing.T) {
	copies := &memstat.Usage{RSS: 10 << 20, Anon: 9 << 20}
	for _, tt := range []struct {
		name string
		vm   api.VM
		want string
	}{
		{"copied pages", api.VM{Policy: policyCopy}, "--policy share"},
		{"huge pages, which cannot be shared", api.VM{Policy: policyCopy, HugePages: true}, ""},
		{"shared pages", api.VM{Policy: policyShare}, ""},
		{"fallback", api.VM{Snapshot: "s", MemBackend: "file", Warnings: []string{"no userfaultfd"}}, "fcvm doctor"},
		{"as asked for", api.VM{Snapshot: "s", MemBackend: "file"}, ""},
	} {
		if got := hint(tt.vm, copies); (got == "") != (tt.want == "") || !strings.Contains(got, tt.want) {
			t.Errorf("%s: hint %q, want %q in it", tt.name, got, tt.want)
		}
	}
}
