package api

import "net/url"

// The routes. A VM's name is one path element, escaped.
const (
	pathInfo      = "/v1/info"
	pathVMs       = "/v1/vms"
	pathClones    = "/v1/clones"
	pathStats     = "/v1/stats"
	pathSnapshots = "/v1/snapshots"
	// pathMetrics is where Prometheus looks.
	pathMetrics = "/metrics"

	// upgradeProto is the protocol that exec and attach switch to.
	upgradeProto = "fcvm-frames"
	// maxBody bounds JSON bodies. The largest are run requests, whose
	// environment and arguments Linux bounds at 2 MiB.
	maxBody = 4 << 20
)

// vmPath returns "" for what no VM can be called, and a path cannot hold.
func vmPath(name, action string) string {
	if name == "" || name == "." || name == ".." {
		return ""
	}
	p := pathVMs + "/" + url.PathEscape(name)
	if action != "" {
		p += "/" + action
	}
	return p
}

type vmList struct {
	Version int  `json:"version"`
	VMs     []VM `json:"vms"`
}

// cloneEvent is one line of the answer to a clone request. The last one has
// Error or Done.
type cloneEvent struct {
	VM    *VM    `json:"vm,omitempty"`
	Error *Error `json:"error,omitempty"`
	Done  bool   `json:"done,omitempty"`
}
