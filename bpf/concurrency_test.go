package bpf_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"tcnat/bpf"
)

// Two CPUs carry packets of the same few tuples while a third party ends the flows and
// changes the rules. A claim (a reply tuple, thus an outside port) must never be two
// conversations' at once: every packet that is translated says whose the claim is at that
// time, and the times at which different ones have it must not overlap.

// use is a time during which one conversation was seen to have a claim.
type use struct {
	claim, owner tuple
	first, last  time.Time
	packets      int
}

// longestUse is the gap that begins another use: the expiry takes longer to free a claim.
const longestUse = time.Second

// uses are those of one worker, by claim and owner; the last one is the current one.
type uses map[[2]tuple][]use

func (u uses) note(claim, owner tuple, began time.Time) {
	key, now := [2]tuple{claim, owner}, time.Now()
	runs := u[key]
	if n := len(runs); n > 0 && began.Sub(runs[n-1].last) < longestUse {
		runs[n-1].last = now
		runs[n-1].packets++
		return
	}
	u[key] = append(runs, use{claim, owner, began, now, 1})
}

// worker sends packets on a CPU of its own.
type worker struct {
	*datapath
	*rand.Rand
	family
	uses    uses
	outcome map[string]int
	wrong   []string
	began   time.Time
	fast    bool // packets meet the bridge's programs as well, which grant and use leases
}

// macAt answers the n-th container's address on its bridge.
func macAt(n int) macs {
	mac := slices.Clone(containerMAC.mac)
	mac[5] += byte(n)
	return macs{mac}
}

// link answers a packet with the link header that it leaves by; nil: with that it came by.
type link func(packet) packet

func (l link) of(p packet) []byte {
	if l == nil {
		return p.frame()
	}
	return l(p).frame()
}

// leave sends a container's packet as far as the uplink.
func (w *worker) leave(in packet) (verdict uint32, out []byte, by link) {
	if w.fast {
		verdict, out = w.runOnce(fromBridge(), in.frame())
		if verdict == redirect {
			w.outcome["redirected out"]++
			return unspec, out, func(p packet) packet { return p.forwarded().between(uplinkMAC, gatewayMAC) }
		}
		if verdict != unspec {
			return verdict, out, nil
		}
	}
	by = func(p packet) packet { return p.between(uplinkMAC, gatewayMAC) }
	verdict, out = w.runOnce(toUplink(), by.of(in))
	return verdict, out, by
}

// arrive receives a packet of the world, which is for the n-th container if it is for one.
func (w *worker) arrive(in packet) (verdict uint32, out []byte, by func(n int) link) {
	verdict, out = w.runOnce(fromUplink(), in.frame())
	if verdict == redirect {
		w.outcome["redirected in"]++
		return unspec, out, func(n int) link {
			return func(p packet) packet { return p.forwarded().between(bridgeMAC, macAt(n)) }
		}
	}
	return verdict, out, func(int) link { return nil }
}

// enter sends what arrive has translated on into the bridge, where its direction gets a lease.
func (w *worker) enter(out []byte, n int, by link) {
	if !w.fast || by != nil {
		return
	}
	out = slices.Clone(out)
	copy(out, macAt(n).mac)
	copy(out[6:], bridgeMAC.mac)
	if verdict, _ := w.runOnce(toBridge(), out); verdict != unspec {
		w.outcome["not let in"]++ // its flow has ended meanwhile
	}
}

// The containers outnumber the ports, and take turns in speaking, so that ports are handed
// on from one to another.
const (
	containers = 8
	turn       = time.Second
)

// containerAt answers the n-th container.
func (f family) containerAt(n int) netip.Addr {
	a := f.container
	for range n {
		a = a.Next()
	}
	return a
}

// speaker answers a container whose turn it is.
func (w *worker) speaker() int {
	return (int(time.Since(w.began)/turn) + w.IntN(2)) % containers
}

// runOnce is run without the test's failing: workers are not the test's goroutine.
func (w *worker) runOnce(h hook, frame []byte) (uint32, []byte) {
	opts := &ebpf.RunOptions{Data: frame, DataOut: make([]byte, len(frame)+64), Context: h.skb}
	verdict, err := w.programs[h.program].Run(opts)
	if err != nil {
		w.wrong = append(w.wrong, err.Error())
	}
	return verdict, opts.DataOut
}

func (w *worker) fail(format string, args ...any) {
	if len(w.wrong) < 10 {
		w.wrong = append(w.wrong, fmt.Sprintf(format, args...))
	}
}

// outward sends a packet of a container and, when it left, its reply.
func (w *worker) outward() {
	proto := pick(w.Rand, []uint8{protoTCP, protoUDP})
	n := w.speaker()
	inside := at(w.containerAt(n), 40000+uint16(w.IntN(2)))
	world := at(pick(w.Rand, []netip.Addr{w.family.world, w.router}), 443)
	in := packet{src: inside, dst: world, proto: proto, tcp: pick(w.Rand, []string{"S", "A", "A", "PA", "FA"}), payload: []byte(inside.String())}.between(macAt(n), bridgeMAC)
	began := time.Now()
	verdict, out, by := w.leave(in)
	if verdict != unspec {
		w.outcome["out dropped"]++
		return
	}
	outside := at(w.poolFirst, sourcePort(w.family, proto, out))
	if !bytes.Equal(out, by.of(in.from(outside))) {
		w.fail("out %s became\n%s", in.tuple(), describe(out))
		return
	}
	w.outcome["out"]++
	claim := tuple{proto, world, outside}
	w.uses.note(claim, in.tuple(), began)
	w.reply(claim)
}

// reply sends a packet to a claim of SNAT and notes who gets it.
func (w *worker) reply(claim tuple) {
	in := packet{src: claim.src, dst: claim.dst, proto: claim.proto, tcp: "A", payload: []byte("reply")}.between(gatewayMAC, uplinkMAC)
	began := time.Now()
	verdict, out, by := w.arrive(in)
	if verdict != unspec {
		w.fail("reply %s: verdict %d", claim, int32(verdict))
		return
	}
	if bytes.Equal(out, in.frame()) {
		w.outcome["reply to nobody"]++
		return
	}
	for n := range containers {
		for port := uint16(40000); port < 40002; port++ {
			if inside := at(w.containerAt(n), port); bytes.Equal(out, by(n).of(in.to(inside))) {
				w.enter(out, n, by(n))
				w.outcome["reply"]++
				w.uses.note(claim, tuple{claim.proto, inside, claim.src}, began)
				return
			}
		}
	}
	w.fail("reply %s became\n%s", claim, describe(out))
}

// inward sends a packet of the world to a published port, and the container's answer.
func (w *worker) inward() {
	proto := pick(w.Rand, []uint8{protoTCP, protoUDP})
	in := packet{
		src: at(w.family.world, 50000+uint16(w.IntN(3))), dst: at(pick(w.Rand, []netip.Addr{w.uplink, w.second}), 3004+uint16(w.IntN(2))),
		proto: proto, tcp: pick(w.Rand, []string{"S", "A", "PA"}), payload: []byte("request"),
	}.between(gatewayMAC, uplinkMAC)
	began := time.Now()
	verdict, out, into := w.arrive(in)
	switch {
	case verdict != unspec:
		w.outcome["in dropped"]++
		return
	case bytes.Equal(out, in.frame()):
		w.outcome["in not published"]++
		return
	}
	client := at(in.src.Addr(), sourcePort(w.family, proto, out))
	server := at(w.container, 80)
	if !bytes.Equal(out, into(0).of(in.addrs(client, server))) {
		w.fail("in %s became\n%s", in.tuple(), describe(out))
		return
	}
	w.enter(out, 0, into(0))
	w.outcome["in"]++
	claim := tuple{proto, server, client}
	w.uses.note(claim, in.tuple(), began)

	answer := packet{src: server, dst: client, proto: proto, tcp: "A", payload: []byte("answer")}.between(macAt(0), bridgeMAC)
	began = time.Now()
	verdict, out, by := w.leave(answer)
	if verdict != unspec {
		w.outcome["answer dropped"]++
		return
	}
	for _, host := range []netip.Addr{w.uplink, w.second} {
		for port := uint16(3004); port < 3006; port++ {
			for sp := uint16(50000); sp < 50003; sp++ {
				owner := tuple{proto, at(client.Addr(), sp), at(host, port)}
				if bytes.Equal(out, by.of(answer.addrs(owner.dst, owner.src))) {
					w.outcome["answer"]++
					w.uses.note(claim, owner, began)
					return
				}
			}
		}
	}
	// or its flow ended, and the answer opened one of the container's own
	if outside := at(w.poolFirst, sourcePort(w.family, proto, out)); bytes.Equal(out, by.of(answer.from(outside))) {
		w.outcome["answer on its own"]++
		w.uses.note(tuple{proto, client, outside}, answer.tuple(), began)
		return
	}
	w.fail("answer %s became\n%s", answer.tuple(), describe(out))
}

// on runs the worker on a CPU until it is told to stop.
func (w *worker) on(cpu int, stop *atomic.Bool) {
	runtime.LockOSThread() // not unlocked: the thread, tied to the CPU, ends with its goroutine
	var set unix.CPUSet
	set.Set(cpu)
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		w.fail("cpu %d: %v", cpu, err)
		return
	}
	for !stop.Load() {
		if w.IntN(2) == 0 {
			w.outward()
		} else {
			w.inward()
		}
	}
}

// cpus answers the CPUs that this process may run on.
func cpus(t *testing.T) (all []int) {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		t.Fatal(err)
	}
	for i := range 1024 {
		if set.IsSet(i) {
			all = append(all, i)
		}
	}
	return all
}

func TestTwoCPUs(t *testing.T) {
	all := cpus(t)
	if len(all) < 2 {
		t.Skip("needs two CPUs")
	}
	lasts := 10 * time.Second
	if testing.Short() {
		lasts = 3 * time.Second
	}
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) { twoCPUs(t, f, all, lasts, false) })
		t.Run(f.name+"/fast", func(t *testing.T) { twoCPUs(t, f, all, lasts, true) })
	}
}

func twoCPUs(t *testing.T, f family, all []int, lasts time.Duration, fast bool) {
	d := load(t, 4096)
	r := seeded(t)
	rules := ruleSet{
		snat: []snatRule{{source: f.subnet, first: f.poolFirst, last: f.poolFirst, ports: portRange{40000, 40002}}},
		dnat: []dnatRule{
			publish(f, protoTCP, portRange{3004, 3005}, one(80)), publish(f, protoUDP, portRange{3004, 3005}, one(80)),
		},
	}
	d.setRules(rules)
	kinds := []string{"out", "reply", "in", "answer"}
	if fast {
		d.setFast(bpf.NATFastPathFAST_PATH_ESTABLISHED, false)
		kinds = append(kinds, "redirected out", "redirected in")
	}
	d.startExpiry()
	var stop atomic.Bool
	var running sync.WaitGroup
	workers := make([]*worker, 2)
	for i := range workers {
		workers[i] = &worker{
			datapath: d, Rand: rand.New(rand.NewPCG(r.Uint64(), 0)), family: f, uses: make(uses), outcome: make(map[string]int), began: time.Now(), fast: fast,
		}
		running.Add(1)
		go func() {
			defer running.Done()
			workers[i].on(all[i], &stop)
		}()
	}
	ended := d.disturb(r, rules, time.Now().Add(lasts))
	stop.Store(true)
	running.Wait()

	d.setRules(rules)
	merged := make(uses)
	for _, w := range workers {
		t.Logf("%v", w.outcome)
		for _, s := range w.wrong {
			t.Error(s)
		}
		for _, kind := range kinds {
			if w.outcome[kind] == 0 {
				t.Errorf("no packet %q", kind)
			}
		}
		for k, v := range w.uses {
			merged[k] = append(merged[k], v...)
		}
	}
	t.Logf("%d flows ended; counted %s", ended, d.counts())
	checkUses(t, merged)
	d.emptied()
}

// disturb ends flows and changes rules until the time given; it answers how many flows it
// ended one by one.
func (d *datapath) disturb(r *rand.Rand, rules ruleSet, until time.Time) (ended int) {
	d.Helper()
	for turn := 0; time.Now().Before(until); turn++ {
		time.Sleep(time.Duration(r.IntN(4)) * time.Millisecond)
		if turn%200 == 199 {
			switch r.IntN(3) {
			case 0: // the rule goes and comes back
				d.setRules(ruleSet{dnat: rules.dnat})
				d.endRule(snatID(0))
				d.setRules(rules)
			case 1:
				d.setRules(ruleSet{snat: rules.snat})
				d.endRule(dnatID(0))
				d.endRule(dnatID(1))
				d.setRules(rules)
			case 2: // a rule beside them
				more := rules
				more.dnat = append(slices.Clone(rules.dnat), publish(families[0], protoTCP, one(9), one(9)))
				d.setRules(more)
			}
			continue
		}
		for key, half := range d.allHalves() {
			if half.Role == bpf.NATRoleROLE_REPLY && r.IntN(8) == 0 && d.endFlow(goTuple(key), half.Standing.Id) {
				ended++
			}
		}
	}
	return ended
}

// checkUses expects that no two conversations had a claim at the same time.
func checkUses(t *testing.T, all uses) {
	t.Helper()
	byClaim := make(map[tuple][]use)
	for _, runs := range all {
		for _, u := range runs {
			byClaim[u.claim] = append(byClaim[u.claim], u)
		}
	}
	handed := 0
	for claim, runs := range byClaim {
		slices.SortFunc(runs, func(a, b use) int { return a.first.Compare(b.first) })
		for i, a := range runs {
			for _, b := range runs[i+1:] {
				if a.owner == b.owner {
					continue
				}
				if b.first.Before(a.last) {
					t.Errorf("%s was %s (%d packets) and %s (%d packets) at the same time, for %s",
						claim, a.owner, a.packets, b.owner, b.packets, a.last.Sub(b.first))
				}
				handed++
			}
		}
	}
	t.Logf("%d claims, handed on %d times", len(byClaim), handed)
	if handed == 0 && !testing.Short() {
		t.Error("no claim was handed on: the test has tested nothing")
	}
}
