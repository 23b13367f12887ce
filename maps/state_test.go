package maps

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"

	"tcnat/bpf"
)

func TestConfigRoundTrip(t *testing.T) {
	s := newState(t)
	for _, want := range []Config{
		{Timeouts: DefaultTimeouts()},
		{Live: true, NetnsCookie: 1 << 63, MaxFlows: 7, AllowDirect: true, PassUnmanaged: true, Timeouts: DefaultTimeouts()},
		{NoIsolation: true, Routed: true, AnySender: true, Timeouts: Timeouts{
			time.Second, 20 * time.Millisecond, 600 * time.Hour, 1500 * time.Millisecond, 3 * time.Second, 4 * time.Second, 5 * time.Second}},
	} {
		if err := s.SetConfig(want); err != nil {
			t.Fatal(err)
		}
		got := must[Config](t)(s.Config())
		if d := diff(want, got); d != "" {
			t.Error(d)
		}
	}
}

// Flows without a rule were let in by a flag; when that is taken away, they end.
func TestFlagsThatGoEndFlowsWithoutRule(t *testing.T) {
	for name, flags := range map[string]Config{"allow direct": {AllowDirect: true}, "routed": {Routed: true}} {
		t.Run(name, func(t *testing.T) {
			s := newState(t)
			flags.Timeouts = DefaultTimeouts()
			generations := []uint32{}
			for _, c := range []Config{{Timeouts: DefaultTimeouts()}, flags, flags, {Timeouts: DefaultTimeouts()}} {
				if err := s.SetConfig(c); err != nil {
					t.Fatal(err)
				}
				generations = append(generations, must[uint32](t)(s.generation(0)))
			}
			if d := diff([]uint32{0, 0, 0, 1}, generations); d != "" {
				t.Errorf("generation of id 0 after each change:%s", d)
			}
		})
	}
}

func TestTimeoutsAreNotShortened(t *testing.T) {
	s := newState(t)
	if err := s.SetConfig(Config{Timeouts: DefaultTimeouts()}); err != nil {
		t.Fatal(err)
	}
	raw := must[bpf.NATConfig](t)(s.rawConfig())
	got := stampTime(raw.Timeout[bpf.NATTimeoutTIMEOUT_TCP_ESTABLISHED])
	if want := 2*time.Hour + 4*time.Minute; got < want || got > want+2*time.Millisecond {
		t.Errorf("tcp-established is %s, want %s and no less", got, want)
	}
}

func TestTimeoutRefusals(t *testing.T) {
	s := newState(t)
	for _, bad := range []time.Duration{0, -time.Second, 27 * 24 * time.Hour} {
		c := Config{Timeouts: DefaultTimeouts()}
		c.Timeouts.UDPNew = bad
		err := s.SetConfig(c)
		if !errors.Is(err, ErrInvalidConfig) || !strings.Contains(err.Error(), "udp-new") {
			t.Errorf("udp-new of %s: %v", bad, err)
		}
	}
}

func TestConfigKeepsRulesAndSecret(t *testing.T) {
	s := newState(t)
	c := Config{Timeouts: DefaultTimeouts()}
	if err := s.SetConfig(c); err != nil {
		t.Fatal(err)
	}
	if err := s.SetRules(Rules{DNAT: []DNATRule{dnat()}}); err != nil {
		t.Fatal(err)
	}
	before := must[bpf.NATConfig](t)(s.rawConfig())
	if before.Secret == [2]uint64{} || before.Rules&1 != 1 {
		t.Fatalf("secret %x, rules %d: want a secret, and set 1", before.Secret, before.Rules)
	}
	c.Live = true
	if err := s.SetConfig(c); err != nil {
		t.Fatal(err)
	}
	for _, live := range []bool{false, true} {
		if err := s.SetLive(live); err != nil {
			t.Fatal(err)
		}
		if got := must[Config](t)(s.Config()); got.Live != live {
			t.Errorf("live is %v, want %v", got.Live, live)
		}
	}
	after := must[bpf.NATConfig](t)(s.rawConfig())
	before.Live = 1
	if after != before {
		t.Errorf("configuration was %+v, is %+v", before, after)
	}
}

func TestDevices(t *testing.T) {
	s := newState(t)
	want := []Device{
		{Ifindex: 3, Class: Bridge, Attach: AttachTCX},
		{Ifindex: 9, Class: Uplink, Attach: AttachClsact, OwnQdisc: true},
		{Ifindex: 12, Class: Uplink, Attach: AttachManual, L3: true},
	}
	for _, i := range []int{1, 0, 2} {
		if err := s.SetDevice(want[i]); err != nil {
			t.Fatal(err)
		}
	}
	if d := diff(want, must[[]Device](t)(s.Devices())); d != "" {
		t.Error(d)
	}
	want[1] = Device{Ifindex: 9, Class: Uplink, Attach: AttachTCX}
	if err := s.SetDevice(want[1]); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second time it is not there
		if err := s.DeleteDevice(3); err != nil {
			t.Fatal(err)
		}
	}
	if d := diff(want[1:], must[[]Device](t)(s.Devices())); d != "" {
		t.Error(d)
	}
}

func TestSubnets(t *testing.T) {
	s := newState(t)
	for _, want := range []map[netip.Prefix]uint32{
		{prefix("172.17.0.0/16"): 3, prefix("fd00::/64"): 3},
		{prefix("172.17.0.0/16"): 4, prefix("172.18.0.0/16"): 3},
		{},
	} {
		if err := s.SetSubnets(want); err != nil {
			t.Fatal(err)
		}
		if d := diff(want, must[map[netip.Prefix]uint32](t)(s.Subnets())); d != "" {
			t.Error(d)
		}
	}
	for _, bad := range []string{"172.17.0.1/16", "::/0", "::ffff:172.17.0.0/112"} {
		if err := s.SetSubnets(map[netip.Prefix]uint32{prefix(bad): 3}); !errors.Is(err, ErrInvalidPrefix) {
			t.Errorf("%s: %v", bad, err)
		}
	}
}

// source looks an address up as the datapath does.
func source(t *testing.T, s *State, ifindex uint32, dst string) string {
	t.Helper()

	var got bpf.NATAddr
	err := s.m.Addresses.Lookup(bpf.NATAddressKey{Prefixlen: 32 + 128, Ifindex: ifindex, Dst: toAddr(addr(dst))}, &got)
	switch {
	case errors.Is(err, ebpf.ErrKeyNotExist):
		return ""
	case err != nil:
		t.Fatal(err)
	}
	return fromAddr(got).String()
}

func TestAddresses(t *testing.T) {
	s := newState(t)
	both := map[netip.Prefix]netip.Addr{
		prefix("0.0.0.0/0"):       addr("203.0.113.2"),
		prefix("198.51.100.0/24"): addr("198.51.100.7"),
		prefix("::/0"):            addr("2001:db8::2"),
		prefix("2000::/3"):        addr("2001:db8::3"), // one of the parts that ::/0 is cut into
	}
	only6 := map[netip.Prefix]netip.Addr{prefix("::/0"): addr("2001:db8::9")}
	for ifindex, sources := range map[uint32]map[netip.Prefix]netip.Addr{2: both, 5: only6} {
		if err := s.SetAddresses(ifindex, sources); err != nil {
			t.Fatal(err)
		}
	}
	check := func(ifindex uint32, want map[string]string) {
		t.Helper()
		for dst, w := range want {
			if got := source(t, s, ifindex, dst); got != w {
				t.Errorf("uplink %d to %s takes %q, want %q", ifindex, dst, got, w)
			}
		}
	}
	check(2, map[string]string{
		"1.1.1.1": "203.0.113.2", "198.51.100.9": "198.51.100.7",
		"2606:4700::1": "2001:db8::3", "fd00::1": "2001:db8::2", "ff0e::1": "2001:db8::2", "1::": "2001:db8::2",
	})
	check(5, map[string]string{"1.1.1.1": "", "0.0.0.0": "", "2606:4700::1": "2001:db8::9"})
	check(9, map[string]string{"1.1.1.1": "", "2606:4700::1": ""})

	if err := s.SetAddresses(2, nil); err != nil {
		t.Fatal(err)
	}
	check(2, map[string]string{"1.1.1.1": "", "fd00::1": ""})
	check(5, map[string]string{"2606:4700::1": "2001:db8::9"})

	mixed := map[netip.Prefix]netip.Addr{prefix("0.0.0.0/0"): addr("2001:db8::2")}
	if err := s.SetAddresses(2, mixed); !errors.Is(err, ErrInvalidPrefix) {
		t.Errorf("an IPv6 source for IPv4: %v", err)
	}
}

func TestUnmanaged(t *testing.T) {
	s := newState(t)
	want := map[uint32]uint64{4: 17, 8: 1}
	for ifindex, n := range want {
		if err := s.m.Unmanaged.Put(ifindex, n); err != nil {
			t.Fatal(err)
		}
	}
	if d := diff(want, must[map[uint32]uint64](t)(s.Unmanaged())); d != "" {
		t.Error(d)
	}
}

func TestEveryCounterHasWords(t *testing.T) {
	spec, err := bpf.LoadNAT()
	if err != nil {
		t.Fatal(err)
	}
	var enum *btf.Enum
	if err := spec.Types.TypeByName("counter", &enum); err != nil {
		t.Fatal(err)
	}
	s := newState(t)
	counts := must[[]Count](t)(s.Counters())
	if want := len(enum.Values) - 2; len(counts) != want { // without DROP_END and COUNTER_COUNT
		t.Errorf("%d counters, want %d", len(counts), want)
	}
	texts := map[string]bool{}
	byName := map[string]Count{}
	for _, c := range counts {
		byName[c.Name] = c
		if texts[c.Text] || !strings.HasSuffix(c.Text, ".") || len(c.Text) < 15 {
			t.Errorf("%s: text %q: want a sentence of its own", c.Name, c.Text)
		}
		texts[c.Text] = true
	}
	for _, v := range enum.Values {
		if v.Name == "DROP_END" || v.Name == "COUNTER_COUNT" {
			continue
		}
		word, drop := strings.CutPrefix(v.Name, "DROP_")
		word = strings.ReplaceAll(strings.ToLower(word), "_", "-")
		if c, ok := byName[word]; !ok || c.Drop != drop {
			t.Errorf("%s: no counter %q with drop %v: %+v", v.Name, word, drop, c)
		}
	}
}

func TestCountersAddUp(t *testing.T) {
	s := newState(t)
	perCPU := make([]uint64, ebpf.MustPossibleCPU())
	var want uint64
	for i := range perCPU {
		perCPU[i] = uint64(10 + i)
		want += perCPU[i]
	}
	if err := s.m.Counters.Put(uint32(bpf.NATCounterDROP_NO_FLOW), perCPU); err != nil {
		t.Fatal(err)
	}
	if err := s.m.PortTries.Put(uint32(2), perCPU); err != nil {
		t.Fatal(err)
	}
	for _, c := range must[[]Count](t)(s.Counters()) {
		if c.Name == "no-flow" && c.Packets != want || c.Name != "no-flow" && c.Packets != 0 {
			t.Errorf("%s is %d", c.Name, c.Packets)
		}
	}
	tries := must[[]uint64](t)(s.PortTries())
	for i, n := range tries {
		if i == 2 && n != want || i != 2 && n != 0 {
			t.Errorf("port tries [%d] is %d", i, n)
		}
	}
	if len(tries) != int(s.m.PortTries.MaxEntries()) {
		t.Errorf("%d port tries", len(tries))
	}
}

func TestExpiry(t *testing.T) {
	s := newState(t)
	if got := must[ExpiryStats](t)(s.Expiry()); got.Ticks != 0 || got.Longest != 0 || got.Checked != 0 {
		t.Errorf("before the first tick: %+v", got)
	}
	now := must[time.Duration](t)(monotonic())
	raw := bpf.NATExpiry{LastTick: uint64(now - time.Minute), Ticks: 5, Longest: 1500, Slow: 2, Checked: 77}
	if err := s.m.Expiry.Put(uint32(0), raw); err != nil {
		t.Fatal(err)
	}
	got := must[ExpiryStats](t)(s.Expiry())
	if got.LastTick < time.Minute || got.LastTick > 2*time.Minute {
		t.Errorf("last tick is %s old, want a minute", got.LastTick)
	}
	if got.LastTick = 0; got != (ExpiryStats{Ticks: 5, Longest: 1500, Slow: 2, Checked: 77}) {
		t.Errorf("got %+v", got)
	}
}

func TestNames(t *testing.T) {
	for want, v := range map[string]fmt.Stringer{
		"bridge": Bridge, "uplink": Uplink, "class 9": DeviceClass(9),
		"tcx": AttachTCX, "clsact": AttachClsact, "manual": AttachManual,
		"identity": Identity, "snat": SNAT, "dnat": DNAT,
		"new": FlowNew, "answered": FlowAnswered, "closing": FlowClosing, "closed": FlowClosed, "ending": FlowEnding,
	} {
		if got := v.String(); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}
