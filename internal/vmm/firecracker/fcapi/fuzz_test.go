package fcapi

import (
	"strings"
	"testing"
)

func FuzzAnswer(f *testing.F) {
	f.Add(200, []byte(`{"firecracker_version":"1.16.1"}`))
	f.Add(400, []byte(`{"fault_message":"An error\n occurred"}`))
	f.Add(400, []byte(`not JSON`))
	f.Add(500, []byte{})
	f.Fuzz(func(t *testing.T, status int, b []byte) {
		var v struct {
			Version string `json:"firecracker_version"`
		}
		err := answer("GET", "/version", status, b, &v)
		if (status < 200 || status > 299) && err == nil {
			t.Error("a refusal counts as success")
		}
		if err != nil && strings.ContainsAny(err.Error(), "\n\r\x00") {
			// A terminal prints it as one line.
			t.Errorf("error %q", err)
		}
		if got, err := ParseVersion(v.Version); err == nil {
			if again, err := ParseVersion(got.String()); err != nil || again != got {
				t.Errorf("%v does not read back: %v, error %v", got, again, err)
			}
		}
	})
}
