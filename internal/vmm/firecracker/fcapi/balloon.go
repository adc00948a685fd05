package fcapi

import (
	"context"
	"fmt"
	"net/http"
)

// Balloon is the device through which the guest gives memory back.
type Balloon struct {
	// AmountMiB is what the guest shall give, in MiB.
	AmountMiB int64 `json:"amount_mib"`
	// DeflateOnOOM lets the guest take it back rather than kill a process.
	DeflateOnOOM bool `json:"deflate_on_oom"`
	// StatsInterval in seconds between the guest's statistics; 0 for none, ever.
	StatsInterval int `json:"stats_polling_interval_s,omitempty"`
	// Hinting and Reporting need [FreePageHinting] and [FreePageReporting].
	Hinting   bool `json:"free_page_hinting,omitempty"`
	Reporting bool `json:"free_page_reporting,omitempty"`
}

// SetBalloon adds the device, before the VM starts.
func (c *Client) SetBalloon(ctx context.Context, b Balloon) error {
	return c.put(ctx, "/balloon", b, map[Feature]bool{FreePageHinting: b.Hinting, FreePageReporting: b.Reporting})
}

// Inflate changes how much the guest of a running VM shall give, in MiB.
func (c *Client) Inflate(ctx context.Context, amountMiB int64) error {
	return c.do(ctx, http.MethodPatch, "/balloon", struct {
		AmountMiB int64 `json:"amount_mib"`
	}{amountMiB}, nil)
}

// BalloonStats is what the guest last told. Fields that it did not tell are nil.
type BalloonStats struct {
	TargetMiB int64 `json:"target_mib"`
	ActualMiB int64 `json:"actual_mib"`
	// Bytes.
	SwapIn    *uint64 `json:"swap_in"`
	SwapOut   *uint64 `json:"swap_out"`
	Free      *uint64 `json:"free_memory"`
	Total     *uint64 `json:"total_memory"`
	Available *uint64 `json:"available_memory"`
	Caches    *uint64 `json:"disk_caches"`
	// Events since the guest booted.
	MajorFaults *uint64 `json:"major_faults"`
	MinorFaults *uint64 `json:"minor_faults"`
	OOMKills    *uint64 `json:"oom_kill"`
}

// BalloonStats asks for them; the device must have been added with an interval.
func (c *Client) BalloonStats(ctx context.Context) (BalloonStats, error) {
	var s BalloonStats
	return s, c.do(ctx, http.MethodGet, "/balloon/statistics", nil, &s)
}

// SetStatsInterval changes the interval, in seconds. Statistics can be turned
// neither on nor off once the VM runs.
func (c *Client) SetStatsInterval(ctx context.Context, seconds int) error {
	return c.do(ctx, http.MethodPatch, "/balloon/statistics", struct {
		Seconds int `json:"stats_polling_interval_s"`
	}{seconds}, nil)
}

// StartHinting asks the guest once for the pages that it does not use
// ([FreePageHinting]). They are discarded as it tells them, and it may use them
// again when it has told all.
func (c *Client) StartHinting(ctx context.Context) error {
	if err := c.version.need(map[Feature]bool{FreePageHinting: true}); err != nil {
		return fmt.Errorf("start hinting: %w", err)
	}
	return c.do(ctx, http.MethodPatch, "/balloon/hinting/start", struct {
		Acknowledge bool `json:"acknowledge_on_stop"`
	}{true}, nil)
}

// StopHinting ends what [Client.StartHinting] began.
func (c *Client) StopHinting(ctx context.Context) error {
	if err := c.version.need(map[Feature]bool{FreePageHinting: true}); err != nil {
		return fmt.Errorf("stop hinting: %w", err)
	}
	return c.do(ctx, http.MethodPatch, "/balloon/hinting/stop", nil, nil)
}
