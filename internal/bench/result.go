package bench

import (
	"slices"
	"time"
)

// Report is what a run came to.
type Report struct {
	Version      string        `json:"version"`
	Commit       string        `json:"commit"`
	Started      time.Time     `json:"started"`
	Duration     time.Duration `json:"duration_ns"`
	Machine      Machine       `json:"machine"`
	Settings     Settings      `json:"settings"`
	Contenders   []Contender   `json:"contenders"`
	Measurements []Measurement `json:"measurements"`
	Goals        []GoalResult  `json:"goals"`
}

// Contender says what a name stands for.
type Contender struct {
	Name  string `json:"name"`
	About string `json:"about"`
}

// Settings are what a run was asked for, and what it set.
type Settings struct {
	Short            bool          `json:"short"`
	Pairs            int           `json:"pairs"`
	StreamPairs      int           `json:"stream_pairs"`
	Seed             uint64        `json:"seed"`
	RunTime          time.Duration `json:"run_time_ns"`
	BridgeNF         int           `json:"bridge_nf_call_iptables"`
	ReversePath      int           `json:"rp_filter"`
	FrameBytes       int           `json:"frame_bytes"`
	Containers       int           `json:"containers"`
	MaxFlows         uint32        `json:"max_flows"`
	ConntrackMax     string        `json:"nf_conntrack_max"`
	ConntrackBuckets string        `json:"nf_conntrack_buckets"`
}

// Measurement is one question, asked in one or more cases.
type Measurement struct {
	Name  string   `json:"name"`
	Title string   `json:"title"`
	Cases []Case   `json:"cases"`
	Notes []string `json:"notes,omitempty"`
	// Failure says why there is no result, or not all of it.
	Failure string `json:"failure,omitempty"`
}

// Case is a comparison under one condition.
type Case struct {
	Name string `json:"name"`
	Unit string `json:"unit"`
	// LowerIsBetter turns ratios around: they are the baseline's value by the contender's.
	LowerIsBetter bool   `json:"lower_is_better,omitempty"`
	Baseline      string `json:"baseline,omitempty"` // whom ratios are to
	Rows          []Row  `json:"rows"`
}

// Row is a contender's result in a case.
type Row struct {
	Contender string    `json:"contender"`
	Values    []float64 `json:"values"`         // of each run, in the unit of the case
	Median    float64   `json:"median"`         // of the values
	Pairs     []float64 `json:"pairs"`          // ratio to the baseline of each pair
	Ratio     float64   `json:"ratio"`          // median of the pairs; 0: there are none
	RatioMin  float64   `json:"ratio_min"`      // of the pairs
	RatioMax  float64   `json:"ratio_max"`      // of the pairs
	PathNs    float64   `json:"path_ns"`        // per packet without the rig's own; 0: not known
	Note      string    `json:"note,omitempty"` // such as: skipped, and why
	Failure   string    `json:"failure,omitempty"`
}

// Failed tells whether anything was not measured that should have been.
func (r *Report) Failed() bool {
	return slices.ContainsFunc(r.Measurements, func(m Measurement) bool { return m.failed() })
}

func (m Measurement) failed() bool {
	return m.Failure != "" || slices.ContainsFunc(m.Cases, func(c Case) bool {
		return slices.ContainsFunc(c.Rows, func(r Row) bool { return r.Failure != "" })
	})
}

// row returns the row of a contender; false where there is none with values.
func (c Case) row(contender string) (Row, bool) {
	at := slices.IndexFunc(c.Rows, func(r Row) bool { return r.Contender == contender && len(r.Values) > 0 })
	if at < 0 {
		return Row{}, false
	}
	return c.Rows[at], true
}

// find returns a case of a measurement; false where it was not measured.
func (r *Report) find(measurement, name string) (Case, bool) {
	for _, m := range r.Measurements {
		if m.Name != measurement {
			continue
		}
		if at := slices.IndexFunc(m.Cases, func(c Case) bool { return c.Name == name }); at >= 0 {
			return m.Cases[at], true
		}
	}
	return Case{}, false
}

// settle works the medians and ratios out from what was measured.
func (c *Case) settle() {
	for i := range c.Rows {
		row := &c.Rows[i]
		row.Median, row.Ratio = median(row.Values), median(row.Pairs)
		if len(row.Pairs) > 0 {
			row.RatioMin, row.RatioMax = slices.Min(row.Pairs), slices.Max(row.Pairs)
		}
	}
	ground, ok := c.row(floor)
	if !ok {
		return
	}
	for i := range c.Rows {
		if row := &c.Rows[i]; row.Contender != floor && row.Median > 0 {
			row.PathNs = 1e9/row.Median - 1e9/ground.Median
		}
	}
}

// ratio is how much better a value is than the baseline's.
func (c *Case) ratio(value, baseline float64) float64 {
	if c.LowerIsBetter {
		value, baseline = baseline, value
	}
	if baseline == 0 {
		return 0
	}
	return value / baseline
}

// median of an even number of values is the mean of the two in the middle; 0 of none.
func median(values []float64) float64 {
	if len(values) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(values))
	middle := len(sorted) / 2
	if len(sorted)%2 == 1 {
		return sorted[middle]
	}
	return (sorted[middle-1] + sorted[middle]) / 2
}

// quantile of sorted values, q from 0 to 1.
func quantile(sorted []float64, q float64) float64 {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[min(int(q*float64(len(sorted))), len(sorted)-1)]
}
