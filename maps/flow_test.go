package maps

import (
	"net/netip"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"tcnat/bpf"
)

func tuple(protocol Protocol, src, dst string) Tuple {
	return Tuple{protocol, netip.MustParseAddrPort(src), netip.MustParseAddrPort(dst)}
}

// pair is a flow as the datapath keeps it.
type pair struct {
	key             bpf.NATTuple // of the original
	original, reply bpf.NATHalf
}

// newPair is a flow with a packet each way at a stamp.
func newPair(id uint32, translation Translation, original, reply Tuple, seen uint32) pair {
	half := bpf.NATHalf{Seen: seen, Translation: bpf.NATTranslation(translation), Packets: 1, Bytes: 100}
	half.Standing.Id = id
	p := pair{key: toTuple(original), original: half, reply: half}
	p.original.Standing.Life = bpf.NATLifeLIFE_ORIGINAL
	p.original.Role, p.original.Other = bpf.NATRoleROLE_ORIGINAL, toTuple(reply)
	p.reply.Role, p.reply.Other = bpf.NATRoleROLE_REPLY, toTuple(original)
	return p
}

func (p pair) put(t *testing.T, s *State) {
	t.Helper()

	if err := s.m.Flows.Put(p.key, p.original); err != nil {
		t.Fatal(err)
	}
	if err := s.m.Flows.Put(p.original.Other, p.reply); err != nil {
		t.Fatal(err)
	}
}

func (p pair) remove(t *testing.T, s *State) {
	t.Helper()

	for _, key := range []bpf.NATTuple{p.key, p.original.Other} {
		if err := s.m.Flows.Delete(key); err != nil {
			t.Fatal(err)
		}
	}
}

var (
	web    = [2]Tuple{tuple(TCP, "172.17.0.2:40000", "1.1.1.1:443"), tuple(TCP, "1.1.1.1:443", "203.0.113.2:40000")}
	dns    = [2]Tuple{tuple(UDP, "172.17.0.3:5353", "8.8.8.8:53"), tuple(UDP, "8.8.8.8:53", "203.0.113.2:5353")}
	served = [2]Tuple{tuple(TCP, "198.51.100.9:50000", "203.0.113.2:3005"), tuple(TCP, "172.17.0.2:80", "198.51.100.9:50000")}
	ping   = [2]Tuple{tuple(ICMPv6, "[fd00::2]:77", "[2001:db8::1]:0"), tuple(ICMPv6, "[2001:db8::1]:0", "[fd00::2]:77")}
)

// configured has default timeouts, and tells the stamp of now.
func configured(t *testing.T) (*State, uint32) {
	t.Helper()

	s := newState(t)
	if err := s.SetConfig(Config{Timeouts: DefaultTimeouts()}); err != nil {
		t.Fatal(err)
	}
	return s, stampOf(must[time.Duration](t)(monotonic()))
}

func TestFlows(t *testing.T) {
	s, now := configured(t)
	const second = 1e9 >> stampShift

	snat := newPair(1, SNAT, web[0], web[1], now-10*second)
	snat.original.Ifindex, snat.original.Rule = 3, 5
	snat.original.Packets, snat.original.Bytes = 7, 700
	snat.reply.Packets, snat.reply.Bytes = 8, 800
	snat.reply.Seen = now - 5*second
	snat.original.Tcp = bpf.NATTcpSeenTCP_SEEN_ACK
	pairs := []pair{
		snat,
		newPair(2, SNAT, dns[0], dns[1], now),
		newPair(3, DNAT, served[0], served[1], now-3600*second),
		newPair(4, Identity, ping[0], ping[1], now),
	}
	for _, p := range pairs {
		p.put(t, s)
	}
	// A half alone, and two whose ids differ: a flow was replaced under the reader.
	lone := newPair(5, SNAT, tuple(UDP, "172.17.0.4:1", "1.1.1.1:1"), tuple(UDP, "1.1.1.1:1", "203.0.113.2:1"), now)
	if err := s.m.Flows.Put(lone.key, lone.original); err != nil {
		t.Fatal(err)
	}
	torn := newPair(6, SNAT, tuple(UDP, "172.17.0.4:2", "1.1.1.1:1"), tuple(UDP, "1.1.1.1:1", "203.0.113.2:2"), now)
	torn.reply.Standing.Id = 7
	torn.put(t, s)

	flows, unpaired, err := s.Flows()
	if err != nil {
		t.Fatal(err)
	}
	if unpaired != 3 || len(flows) != 4 {
		t.Fatalf("%d flows and %d halves, want 4 and 3", len(flows), unpaired)
	}
	if got := must[map[string]int](t)(s.Elements()); got["flows"] != 11 || got["mappings"] != 0 {
		t.Errorf("elements: %v", got)
	}
	for i, want := range [][2]Tuple{web, served, dns, ping} {
		if flows[i].Original != want[0] || flows[i].Reply != want[1] {
			t.Errorf("flow %d is %s and %s, want %s and %s", i, flows[i].Original, flows[i].Reply, want[0], want[1])
		}
	}
	got := flows[0]
	if got.Idle < 5*time.Second-10*time.Millisecond || got.Idle > 9*time.Second {
		t.Errorf("idle for %s, want about 5 s", got.Idle)
	}
	if sum := got.Idle + got.Timeout; sum < 124*time.Minute || sum > 124*time.Minute+time.Second {
		t.Errorf("timeout in %s after %s, want 2h4m in all", got.Timeout, got.Idle)
	}
	got.Idle, got.Timeout = 0, 0
	want := Flow{
		ID: 1, Translation: SNAT, Original: web[0], Reply: web[1], State: FlowAnswered,
		Ifindex: 3, Rule: 5, Out: Traffic{7, 700}, In: Traffic{8, 800},
	}
	if d := diff(want, got); d != "" {
		t.Error(d)
	}
	if flows[1].Timeout != 0 {
		t.Errorf("a flow past its timeout has %s left", flows[1].Timeout)
	}
}

// What RFC 4787 (REQ-5), 5382 (REQ-5) and 5508 (REQ-2) ask for.
func TestDefaultTimeouts(t *testing.T) {
	want := Timeouts{
		TCPEstablished: 124 * time.Minute, TCPTransitory: 4 * time.Minute, TCPClosed: 30 * time.Second,
		UDP: 5 * time.Minute, UDPNew: 2 * time.Minute, UDPWellKnown: 30 * time.Second, ICMP: time.Minute,
	}
	if got := DefaultTimeouts(); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
}

func TestFlowStatesAndTimeouts(t *testing.T) {
	const (
		fin = bpf.NATTcpSeenTCP_SEEN_FIN
		rst = bpf.NATTcpSeenTCP_SEEN_RST
		ack = bpf.NATTcpSeenTCP_SEEN_ACK
	)
	s, now := configured(t)
	timeouts := DefaultTimeouts()
	published := [2]Tuple{tuple(UDP, "198.51.100.9:5", "203.0.113.2:53"), tuple(UDP, "172.17.0.2:53", "198.51.100.9:5")}
	game := [2]Tuple{tuple(UDP, "172.17.0.2:5", "1.1.1.1:443"), tuple(UDP, "1.1.1.1:443", "203.0.113.2:5")}
	signalling := [2]Tuple{tuple(SCTP, "172.17.0.2:5", "1.1.1.1:36412"), tuple(SCTP, "1.1.1.1:36412", "203.0.113.2:5")}
	lite := [2]Tuple{tuple(UDPLite, "172.17.0.2:5", "1.1.1.1:443"), tuple(UDPLite, "1.1.1.1:443", "203.0.113.2:5")}
	oneWay := func(p *pair) { p.reply.Packets = 0 }
	tcp := func(original, reply bpf.NATTcpSeen) func(*pair) {
		return func(p *pair) { p.original.Tcp, p.reply.Tcp = original, reply }
	}
	for name, test := range map[string]struct {
		translation Translation
		tuples      [2]Tuple
		edit        func(*pair)
		state       FlowState
		timeout     time.Duration
	}{
		"tcp new":             {SNAT, web, oneWay, FlowNew, timeouts.TCPTransitory},
		"tcp handshake":       {SNAT, web, tcp(0, ack), FlowNew, timeouts.TCPTransitory},
		"tcp answered":        {SNAT, web, tcp(ack, ack), FlowAnswered, timeouts.TCPEstablished},
		"tcp published":       {DNAT, served, tcp(ack, 0), FlowAnswered, timeouts.TCPEstablished},
		"tcp FIN out":         {SNAT, web, tcp(ack|fin, ack), FlowClosing, timeouts.TCPTransitory},
		"tcp FIN in":          {SNAT, web, tcp(ack, ack|fin), FlowClosing, timeouts.TCPTransitory},
		"tcp FIN both":        {SNAT, web, tcp(fin, fin), FlowClosed, timeouts.TCPClosed},
		"tcp RST out":         {SNAT, web, tcp(ack|rst, ack), FlowClosed, timeouts.TCPTransitory},
		"tcp RST in":          {SNAT, web, tcp(0, rst), FlowClosed, timeouts.TCPTransitory},
		"tcp RST after FINs":  {SNAT, web, tcp(fin|rst, fin), FlowClosed, timeouts.TCPTransitory},
		"sctp new":            {SNAT, signalling, oneWay, FlowNew, timeouts.TCPTransitory},
		"sctp handshake":      {SNAT, signalling, tcp(0, ack), FlowNew, timeouts.TCPTransitory},
		"sctp answered":       {SNAT, signalling, tcp(ack, ack), FlowAnswered, timeouts.TCPEstablished},
		"sctp SHUTDOWN":       {SNAT, signalling, tcp(ack|fin, ack), FlowClosing, timeouts.TCPTransitory},
		"sctp SHUTDOWN ACK":   {SNAT, signalling, tcp(ack|fin, ack|fin), FlowClosed, timeouts.TCPClosed},
		"sctp ABORT":          {SNAT, signalling, tcp(ack, ack|rst), FlowClosed, timeouts.TCPTransitory},
		"udp new":             {SNAT, game, oneWay, FlowNew, timeouts.UDPNew},
		"udp answered":        {SNAT, game, nil, FlowAnswered, timeouts.UDP},
		"udp well known":      {SNAT, dns, nil, FlowAnswered, timeouts.UDPWellKnown},
		"udp well known, new": {SNAT, dns, oneWay, FlowNew, timeouts.UDPWellKnown},
		"udp routed":          {Identity, dns, nil, FlowAnswered, timeouts.UDPWellKnown},
		"udp published":       {DNAT, published, nil, FlowAnswered, timeouts.UDP},
		"udp published, new":  {DNAT, published, oneWay, FlowNew, timeouts.UDPNew},
		"udplite answered":    {SNAT, lite, nil, FlowAnswered, timeouts.UDP},
		"udplite new":         {SNAT, lite, oneWay, FlowNew, timeouts.UDPNew},
		"icmp new":            {SNAT, ping, oneWay, FlowNew, timeouts.ICMP},
		"icmp answered":       {SNAT, ping, nil, FlowAnswered, timeouts.ICMP},
		"marked":              {SNAT, web, func(p *pair) { p.original.Standing.Life = bpf.NATLifeLIFE_ORIGINAL_ENDING }, FlowEnding, 0},
		"buried":              {SNAT, web, func(p *pair) { p.reply.Standing.Life = bpf.NATLifeLIFE_BURIED }, FlowEnding, 0},
		"expiring":            {SNAT, web, func(p *pair) { p.reply.Standing.Life = bpf.NATLifeLIFE_ENDING }, FlowEnding, 0},
		"dead":                {SNAT, web, func(p *pair) { p.reply.Standing.Life = bpf.NATLifeLIFE_DEAD }, FlowEnding, 0},
		"rule gone":           {SNAT, web, func(p *pair) { p.original.Generation++; p.reply.Generation++ }, FlowEnding, 0},
		"half flushed":        {SNAT, web, func(p *pair) { p.reply.Generation++ }, FlowEnding, 0},
		"no such rule": {SNAT, web, func(p *pair) {
			p.original.Rule, p.reply.Rule = 1<<31, 1<<31
		}, FlowEnding, 0},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPair(1, test.translation, test.tuples[0], test.tuples[1], now)
			if test.edit != nil {
				test.edit(&p)
			}
			p.put(t, s)
			defer p.remove(t, s)
			flows, _, err := s.Flows()
			if err != nil || len(flows) != 1 {
				t.Fatalf("%d flows, error %v", len(flows), err)
			}
			got := flows[0]
			if got.State != test.state {
				t.Errorf("state is %s, want %s", got.State, test.state)
			}
			sum := got.Timeout
			if sum != 0 {
				sum += got.Idle
			}
			if sum < test.timeout || sum > test.timeout+10*time.Millisecond {
				t.Errorf("timeout is %s, want %s", sum, test.timeout)
			}
		})
	}
}

func TestIdleWraps(t *testing.T) {
	for _, test := range []struct{ now, a, b, want uint32 }{
		{100, 40, 60, 40},
		{100, 60, 40, 40},
		{10, 0xfffffff0, 0xffffff00, 26},
		{10, 0xfffffff0, 5, 5},
		{10, 11, 3, 0}, // seen by another CPU after now was read
	} {
		if got := idle(test.now, test.a, test.b); got != test.want {
			t.Errorf("idle(%#x, %#x, %#x) is %d, want %d", test.now, test.a, test.b, got, test.want)
		}
	}
}

func TestRuleChangeEndsFlows(t *testing.T) {
	s, now := configured(t)
	rules := set(t, s, Rules{DNAT: []DNATRule{dnat(), dnat(func(r *DNATRule) { r.Ports = SinglePort(1) })}})
	for i, r := range rules.DNAT {
		tuples := [2]Tuple{served[0], served[1]}
		tuples[0].Src = netip.AddrPortFrom(served[0].Src.Addr(), uint16(i+1))
		tuples[1].Dst = tuples[0].Src
		p := newPair(uint32(i+1), DNAT, tuples[0], tuples[1], now)
		p.original.Rule, p.reply.Rule = r.ID, r.ID
		p.put(t, s)
	}
	set(t, s, Rules{DNAT: rules.DNAT[1:]})
	flows, _, err := s.Flows()
	if err != nil || len(flows) != 2 {
		t.Fatalf("%d flows, error %v", len(flows), err)
	}
	if flows[0].State != FlowEnding || flows[1].State == FlowEnding {
		t.Errorf("states are %s for the rule gone, %s for the other", flows[0].State, flows[1].State)
	}
}

func TestFlowFilter(t *testing.T) {
	snat := Flow{Original: web[0], Reply: web[1]}
	dnat := Flow{Original: served[0], Reply: served[1]}
	for name, test := range map[string]struct {
		filter     FlowFilter
		snat, dnat bool
	}{
		"all":                {FlowFilter{}, true, true},
		"protocol":           {FlowFilter{Protocol: TCP}, true, true},
		"other protocol":     {FlowFilter{Protocol: UDP}, false, false},
		"source":             {FlowFilter{Source: prefix("172.17.0.0/16")}, true, false},
		"destination":        {FlowFilter{Destination: prefix("203.0.113.2/32")}, false, true},
		"port":               {FlowFilter{DestinationPort: 443}, true, false},
		"published port":     {FlowFilter{DestinationPort: 3005}, false, true},
		"container":          {FlowFilter{Container: addr("172.17.0.2")}, true, true},
		"other container":    {FlowFilter{Container: addr("172.17.0.3")}, false, false},
		"host":               {FlowFilter{Container: addr("203.0.113.2")}, false, false},
		"container and port": {FlowFilter{Container: addr("172.17.0.2"), DestinationPort: 443}, true, false},
	} {
		if got := test.filter.Match(snat); got != test.snat {
			t.Errorf("%s: matches an SNAT flow is %v", name, got)
		}
		if got := test.filter.Match(dnat); got != test.dnat {
			t.Errorf("%s: matches a DNAT flow is %v", name, got)
		}
	}
}

func TestFlushFlows(t *testing.T) {
	var objects struct {
		bpf.NATMaps
		End *ebpf.Program `ebpf:"end_flow"`
	}
	load(t, &objects)
	t.Cleanup(func() {
		objects.NATMaps.Close()
		objects.End.Close()
	})
	s := New(&objects.NATMaps)
	if err := s.SetConfig(Config{Timeouts: DefaultTimeouts()}); err != nil {
		t.Fatal(err)
	}
	now := stampOf(must[time.Duration](t)(monotonic()))
	newPair(1, SNAT, web[0], web[1], now).put(t, s)
	newPair(2, SNAT, dns[0], dns[1], now).put(t, s)

	if n, err := s.FlushFlows(objects.End, FlowFilter{Protocol: UDP}); err != nil || n != 1 {
		t.Fatalf("flushed %d flows, error %v; want 1", n, err)
	}
	flows, _, err := s.Flows()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range flows {
		if ending := f.State == FlowEnding; ending != (f.Original.Protocol == UDP) {
			t.Errorf("%s is %s", f.Original, f.State)
		}
	}
	if n, err := s.FlushFlows(objects.End, FlowFilter{DestinationPort: 4444}); err != nil || n != 0 {
		t.Errorf("flushed %d flows of no match, error %v", n, err)
	}
}
