package bpf_test

import (
	"testing"
	"time"

	"tcnat/bpf"
)

// Each state of a flow has the timer that it should have: when that timer alone is short, these flows end, and no
// others do. How long they are by default is maps.DefaultTimeouts.
func TestTimeouts(t *testing.T) {
	t.Parallel()          // most of it is waiting
	const never = 1 << 30 // stamps: 13 days
	// what is sent (>) and received (<), by flags
	states := []struct {
		name  string
		proto protocol
		port  uint16 // of the world; 0: 443
		talk  []string
		timer bpf.NATTimeout
	}{
		{"tcp, a SYN", tcp, 0, []string{">S"}, bpf.NATTimeoutTIMEOUT_TCP_TRANSITORY},
		{"tcp, answered, not acknowledged", tcp, 0, []string{">S", "<SA"}, bpf.NATTimeoutTIMEOUT_TCP_TRANSITORY},
		{"tcp, established", tcp, 0, []string{">S", "<SA", ">A"}, bpf.NATTimeoutTIMEOUT_TCP_ESTABLISHED},
		{"tcp, half closed", tcp, 0, []string{">S", "<SA", ">A", ">FA"}, bpf.NATTimeoutTIMEOUT_TCP_TRANSITORY},
		{"tcp, closed", tcp, 0, []string{">S", "<SA", ">A", ">FA", "<FA", ">A"}, bpf.NATTimeoutTIMEOUT_TCP_CLOSED},
		{"tcp, reset", tcp, 0, []string{">S", "<SA", ">A", "<R"}, bpf.NATTimeoutTIMEOUT_TCP_TRANSITORY},
		{"tcp, goes on after a reset", tcp, 0, []string{">S", "<SA", ">A", "<R", "<A"}, bpf.NATTimeoutTIMEOUT_TCP_ESTABLISHED},
		{"udp, not answered", udp, 0, []string{">"}, bpf.NATTimeoutTIMEOUT_UDP_NEW},
		{"udp, answered", udp, 0, []string{">", "<"}, bpf.NATTimeoutTIMEOUT_UDP},
		{"udp, DNS", udp, 53, []string{">", "<"}, bpf.NATTimeoutTIMEOUT_UDP_WELL_KNOWN},
		{"udp, NTP", udp, 123, []string{">"}, bpf.NATTimeoutTIMEOUT_UDP_WELL_KNOWN},
		{"udp, another low port", udp, 443, []string{">", "<"}, bpf.NATTimeoutTIMEOUT_UDP},
		{"echo", echo, 0, []string{">", "<"}, bpf.NATTimeoutTIMEOUT_ICMP},
	}
	d := load(t, 1024)
	rules := ruleSet{}
	for _, f := range families {
		rules.snat = append(rules.snat, snatRule{source: f.subnet, masquerade: true})
	}
	d.setRules(rules)
	shorten := func(short bpf.NATTimeout) {
		d.configure(func(c *bpf.NATConfig) {
			for i := range c.Timeout {
				c.Timeout[i] = never
			}
			c.Timeout[short] = 1
		})
	}
	shorten(bpf.NATTimeoutTIMEOUT_COUNT)
	flows := make(map[bpf.NATTimeout]map[tuple]string)
	for _, f := range families {
		for i, s := range states {
			c := d.path(f, s.proto)
			c.inside = at(f.container, 41000+uint16(i))
			if s.port != 0 {
				c.peer = at(f.world, s.port)
			}
			c.outside, c.world = at(f.uplink, c.inside.Port()), c.peer
			for _, packet := range s.talk {
				if packet[0] == '>' {
					c.sends(packet[1:], "x")
				} else {
					c.receives(packet[1:], "x")
				}
			}
			original, _ := c.tuples(false)
			if flows[s.timer] == nil {
				flows[s.timer] = make(map[tuple]string)
			}
			flows[s.timer][original] = f.name + ", " + s.name
		}
	}
	left := 2 * len(families) * len(states)
	if n := d.halves(); n != left {
		t.Fatalf("%d halves, want %d:\n%s", n, left, d.allFlows())
	}
	d.startExpiry()
	for timer := range bpf.NATTimeoutTIMEOUT_COUNT {
		if len(flows[timer]) == 0 {
			t.Errorf("no flow has timer %v", timer)
			continue
		}
		shorten(timer)
		left -= 2 * len(flows[timer])
		d.until("the flows of one timer end", 30*time.Second, func() bool { return d.halves() <= left })
		for other, names := range flows {
			for original, name := range names {
				if _, there := d.half(original); there != (other > timer) {
					t.Errorf("when timer %v is short: %s is there: %t, want %t", timer, name, there, other > timer)
				}
			}
		}
	}
}
