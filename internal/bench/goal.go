package bench

// GoalResult is a goal and what a run reached.
type GoalResult struct {
	Goal     string  `json:"goal"`
	AtMost   bool    `json:"at_most,omitempty"` // the value is to be small
	Want     float64 `json:"want"`
	Beyond   float64 `json:"beyond,omitempty"` // what would be better still; 0: nothing is named
	Measured bool    `json:"measured"`
	Value    float64 `json:"value"`
	Met      bool    `json:"met"`
}

// goal is one line of what the fast path must show.
type goal struct {
	text         string
	want, beyond float64
	atMost       bool
	value        func(*Report) (float64, bool)
}

func goals() []goal {
	const (
		one, many = "1 flow", "10k flows"
		pass      = "60k flows to one destination"
	)
	return []goal{
		{"out, 1 flow: x plain", 1.30, 1.42, false, toPlain("out", one, tcnatLeased)},
		{"out, 10k flows: x plain", 1.30, 1.42, false, toPlain("out", many, tcnatLeased)},
		{"out, 1 flow: path cost, x iptables'", 0.33, 0, true, pathTo("out", one, tcnatLeased, iptables)},
		{"in, 1 flow: x plain", 1.40, 1.50, false, toPlain("in", one, tcnatLeased)},
		{"in, 10k flows: x plain", 1.40, 1.50, false, toPlain("in", many, tcnatLeased)},
		{"out, partial checksums: x iptables", 1.6, 0, false, to("out-partial", many, tcnatLeased, iptables)},
		{"in, partial checksums: x iptables", 1.6, 0, false, to("in-partial", many, tcnatLeased, iptables)},
		{"out without port programs, 1 flow: x plain", 1.00, 1.05, false, toPlain("out", one, tcnatNoPorts)},
		{"in without port programs, 1 flow: x plain", 1.00, 1.05, false, toPlain("in", one, tcnatNoPorts)},
		{"new flows, established: x iptables", 1.7, 2.1, false, to("new", pass, tcnatLeased, iptables)},
		{"new flows, always: x iptables", 2.3, 3.0, false, to("new", pass, tcnatAlways, iptables)},
		{"new flows, established, preallocated: x iptables", 1.7, 2.1, false, to("new", pass, tcnatLeasedPre, iptables)},
		{"new flows, always, preallocated: x iptables", 2.3, 3.0, false, to("new", pass, tcnatAlwaysPre, iptables)},
		{"500k new flows, established: x iptables", 1.7, 2.1, false, to("new", "500k flows", tcnatLeased, iptables)},
		{"500k new flows, always: x iptables", 2.3, 3.0, false, to("new", "500k flows", tcnatAlways, iptables)},
		{"500k new flows, established, preallocated: x iptables", 1.7, 2.1, false, to("new", "500k flows", tcnatLeasedPre, iptables)},
		{"500k new flows, always, preallocated: x iptables", 2.3, 3.0, false, to("new", "500k flows", tcnatAlwaysPre, iptables)},
		{"500k answered flows: x iptables", 1.45, 1.8, false, to("flows", "500k flows", tcnatLeased, iptables)},
		{"1M answered flows: x iptables", 1.45, 1.8, false, to("flows", "1M flows", tcnatLeased, iptables)},
		{"100k rules, new flows: x one rule", 0.95, 0, false, caseTo("rules", "new flows, 100k rules", "new flows, 1 rule", tcnatLeased)},
		{"100k rules: loaded, ms", 300, 0, true, medianOf("rules", "load 100k rules", tcnatLeased)},
		{"100k rules: one more, ms", 20, 0, true, medianOf("rules", "add one to 100k rules", tcnatLeased)},
		{"stream, world to container: x plain", 0.97, 0, false, toPlain("stream", "world to container", tcnatLeased)},
		{"stream, container to world: x plain", 0.97, 0, false, toPlain("stream", "container to world", tcnatLeased)},
		{"connections: x iptables", 1.05, 0, false, to("crr", "serial client", tcnatLeased, iptables)},
		{"connections: x docker-proxy", 2, 0, false, to("crr", "serial client", tcnatLeased, dockerProxy)},
		{"connections: x plain", 0, 1.0, false, toPlain("crr", "serial client", tcnatLeased)},
		{"scaling to two CPUs: x plain's", 0.95, 0, false, toPlain("twocpu", "two containers", tcnatLeased)},
		{"memory of a TCP flow, bytes", 480, 384, true, medianOf("memory", "memlock of a TCP flow", tcnatLeased)},
		{"memory with no flow, MB", 20, 0, true, medianOf("memory", "memlock with no flow", tcnatLeased)},
		{"the host's own datagrams: x plain", 0.97, 0, false, toPlain("host", "datagrams sent", tcnatLeased)},
		{"the host's own TCP stream: x plain", 0.97, 0, false, toPlain("host", "TCP stream sent", tcnatLeased)},
		{"attach, ms", 300, 150, true, medianOf("attach", "fresh", tcnatLeased)},
	}
}

// judge holds the results against the goals.
func (r *Report) judge() []GoalResult {
	var results []GoalResult
	for _, g := range goals() {
		result := GoalResult{Goal: g.text, AtMost: g.atMost, Want: g.want, Beyond: g.beyond}
		result.Value, result.Measured = g.value(r)
		if g.atMost {
			result.Met = result.Measured && result.Value <= g.want
		} else {
			result.Met = result.Measured && result.Value >= g.want
		}
		results = append(results, result)
	}
	return results
}

// toPlain is the ratio to plain forwarding.
func toPlain(measurement, name, contender string) func(*Report) (float64, bool) {
	return func(r *Report) (float64, bool) {
		c, ok := r.find(measurement, name)
		if !ok {
			return 0, false
		}
		row, ok := c.row(contender)
		return row.Ratio, ok
	}
}

// to compares the ratios to plain of two contenders, each of which is of pairs.
func to(measurement, name, contender, other string) func(*Report) (float64, bool) {
	return quotient(toPlain(measurement, name, contender), toPlain(measurement, name, other))
}

func pathTo(measurement, name, contender, other string) func(*Report) (float64, bool) {
	path := func(who string) func(*Report) (float64, bool) {
		return func(r *Report) (float64, bool) {
			c, _ := r.find(measurement, name)
			row, ok := c.row(who)
			return row.PathNs, ok && row.PathNs > 0
		}
	}
	return quotient(path(contender), path(other))
}

// caseTo compares two cases of one contender.
func caseTo(measurement, name, other, contender string) func(*Report) (float64, bool) {
	return quotient(toPlain(measurement, name, contender), toPlain(measurement, other, contender))
}

func medianOf(measurement, name, contender string) func(*Report) (float64, bool) {
	return func(r *Report) (float64, bool) {
		c, _ := r.find(measurement, name)
		row, ok := c.row(contender)
		return row.Median, ok
	}
}

func quotient(a, b func(*Report) (float64, bool)) func(*Report) (float64, bool) {
	return func(r *Report) (float64, bool) {
		over, ok := a(r)
		under, also := b(r)
		if !ok || !also || under == 0 {
			return 0, false
		}
		return over / under, true
	}
}
