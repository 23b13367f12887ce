package bpf_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"maps"
	"math/rand/v2"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"

	"tcnat/bpf"
)

// chunksOf makes the packet one of chunks, with this verification tag.
func (p packet) chunksOf(tag uint32, chunks ...[]byte) packet {
	p.tcp, p.sctpTag, p.payload = "chunks", tag, bytes.Join(chunks, nil)
	return p
}

// The checksum follows the ports, whatever the packet's length and content: compared with a CRC32c of the
// whole.
func TestSCTPChecksum(t *testing.T) {
	d := load(t, 1<<15)
	rng := seeded(t)
	for _, f := range families {
		for _, p := range []protocol{sctp, sctpZero} {
			d.each(f.name+"/"+p.name, func(d *datapath) {
				d.setRules(ruleSet{snat: []snatRule{{source: f.subnet, first: f.second, last: f.second, ports: portRange{1, 65535}}}})
				for length := 16; length <= 1500; length++ {
					c := d.path(f, p).as(f.second, 0).by(f.container, uint16(1+rng.IntN(65535)))
					c = c.toward(at(f.world, uint16(1+rng.IntN(65535))))
					d.sctpOfLength(rng, c, length)
				}
				for _, length := range []int{2000, 2999, 3300} { // prog.Run takes a page
					c := d.path(f, p).as(f.second, 0).by(f.container, uint16(1+rng.IntN(65535)))
					d.sctpOfLength(rng, c, length)
				}
			})
		}
	}
}

// sctpOfLength carries a packet of so many bytes from the SCTP header on, and its answer, through changed ports.
func (d *datapath) sctpOfLength(rng *rand.Rand, c path, length int) {
	d.Helper()
	rest := make([]byte, length-12)
	for i := range rest {
		rest[i] = byte(rng.Uint32())
	}
	copy(rest, []byte{chunkData, 3, byte(len(rest) >> 8), byte(len(rest))})
	tag := rng.Uint32()
	run := func(h hook, in packet) []byte {
		d.Helper()
		verdict, out := d.run(h, in.frame())
		if verdict != unspec {
			d.Fatalf("%d bytes: verdict %d; counted %s", length, int32(verdict), d.counts())
		}
		return out
	}
	// another container has the port already, so it must change
	other := c.by(c.other, c.inside.Port())
	other.open()
	sent, _ := c.out("", "")
	sent = sent.chunksOf(tag, rest)
	out := run(toUplink(), sent)
	c.outside = at(c.outside.Addr(), sourcePort(c.family, c.proto, out))
	if c.outside.Port() == c.inside.Port() {
		d.Fatal("the port has not changed")
	}
	d.sameFrame(sent.addrs(c.outside, c.world).frame(), out)
	wire, seen := c.in("", "")
	wire, seen = wire.chunksOf(tag, rest), seen.chunksOf(tag, rest)
	d.sameFrame(seen.frame(), run(fromUplink(), wire))
}

// What a CRC32c changes by, up to the longest packet, as far as the function of the datapath tells.
func TestCRC32cChange(t *testing.T) {
	var code, functions asm.Instructions
	taken := false
	for i, ins := range natSpec().Programs[bpf.NATProgToUplink].Instructions {
		if i == 0 { // int f(struct __sk_buff *), whose mark and priority are the arguments
			load := asm.LoadMem(asm.R6, asm.R1, int16(unsafe.Offsetof(skb{}.Priority)), asm.Word)
			load.Metadata = ins.Metadata
			code = asm.Instructions{
				load, asm.LoadMem(asm.R1, asm.R1, int16(unsafe.Offsetof(skb{}.Mark)), asm.Word), asm.Mov.Reg(asm.R2, asm.R6),
				asm.Call.Label("crc32c_change"), asm.Return(),
			}
			continue
		}
		if symbol := ins.Symbol(); symbol != "" {
			taken = symbol == "crc32c_change" || symbol == "crc32c_multiply"
		}
		if taken {
			functions = append(functions, ins)
		}
	}
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "GPL", Instructions: append(code, functions...)})
	if err != nil {
		t.Fatalf("%+v", err)
	}
	defer p.Close()
	rng := seeded(t)
	table := crc32.MakeTable(crc32.Castagnoli)
	lengths := []int{4, 5, 12, 1 << 14, 1 << 15, 1<<16 - 1}
	for range 300 {
		lengths = append(lengths, 4+rng.IntN(1<<16-4))
	}
	for _, length := range lengths {
		a, b := make([]byte, length), make([]byte, length)
		binary.LittleEndian.PutUint32(a, rng.Uint32())
		binary.LittleEndian.PutUint32(b, rng.Uint32())
		change := binary.LittleEndian.Uint32(a) ^ binary.LittleEndian.Uint32(b)
		got, err := p.Run(&ebpf.RunOptions{Data: make([]byte, 64), Context: skb{Mark: change, Priority: uint32(length)}})
		if err != nil {
			t.Fatal(err)
		}
		if want := crc32.Checksum(a, table) ^ crc32.Checksum(b, table); got != want {
			t.Errorf("%d bytes, the first changed by %08x: CRC changed by %08x, want %08x", length, change, got, want)
		}
	}
}

// sctpCase is a packet, and what it says of its association.
type sctpCase struct {
	name   string
	tag    uint32
	chunks [][]byte
	begins bool           // a flow where there is none
	sees   bpf.NATTcpSeen // where the direction had seen nothing but an RST
	broken bool           // every receiver discards it
}

func sctpCases() []sctpCase {
	init := chunk(chunkInit, strings.Repeat("i", 16))
	data := chunk(chunkData, strings.Repeat("d", 15))
	sack := chunk(chunkSack, strings.Repeat("s", 12))
	abort, shutdown := chunk(chunkAbort, ""), chunk(chunkShutdown, "tsn.")
	complete := chunk(chunkShutdownComplete, "")
	many := bytes.Repeat(chunk(chunkHeartbeat, "h"), 20)
	return []sctpCase{
		{name: "init", chunks: [][]byte{init}, begins: true, sees: sawSYN | sawACK},
		{name: "init-ack", tag: 1, chunks: [][]byte{chunk(chunkInitAck, strings.Repeat("i", 17))}, begins: true, sees: sawSYN},
		{name: "cookie-echo", tag: 1, chunks: [][]byte{chunk(chunkCookieEcho, "cookie")}, begins: true, sees: sawACK},
		{name: "cookie-echo-data", tag: 1, chunks: [][]byte{chunk(chunkCookieEcho, "cookie"), data}, begins: true, sees: sawACK},
		{name: "cookie-ack", tag: 1, chunks: [][]byte{chunk(chunkCookieAck, "")}, sees: sawACK},
		{name: "data", tag: 1, chunks: [][]byte{data, data, data}, begins: true, sees: sawACK},
		{name: "i-data", tag: 1, chunks: [][]byte{chunk(chunkIData, strings.Repeat("d", 16))}, begins: true, sees: sawACK},
		{name: "asconf", tag: 1, chunks: [][]byte{chunk(chunkAsconf, "x")}, begins: true, sees: sawACK},
		{name: "sack-data", tag: 1, chunks: [][]byte{sack, data}, begins: true, sees: sawACK},
		{name: "heartbeat", tag: 1, chunks: [][]byte{chunk(chunkHeartbeat, "h")}, begins: true, sees: sawACK},
		{name: "many", tag: 1, chunks: [][]byte{many}, begins: true, sees: sawACK},
		{name: "error", tag: 1, chunks: [][]byte{chunk(chunkError, "what")}, begins: true, sees: sawACK},
		{name: "shutdown", tag: 1, chunks: [][]byte{shutdown}, begins: true, sees: sawACK | sawFIN},
		{name: "sack-shutdown", tag: 1, chunks: [][]byte{sack, shutdown}, begins: true, sees: sawACK | sawFIN},
		{name: "shutdown-ack", tag: 1, chunks: [][]byte{chunk(chunkShutdownAck, "")}, begins: true, sees: sawACK | sawFIN},
		{name: "shutdown-complete", tag: 1, chunks: [][]byte{complete}, sees: sawACK | sawFIN},
		{name: "abort", tag: 1, chunks: [][]byte{abort}, sees: sawRST | sawACK},
		{name: "abort-tag-0", chunks: [][]byte{abort}, sees: sawRST | sawACK},
		{name: "auth-abort", tag: 1, chunks: [][]byte{chunk(chunkAuth, "mac"), abort}, sees: sawRST | sawACK},
		{name: "cut-in-chunk", tag: 1, chunks: [][]byte{data[:9]}, begins: true, sees: sawACK},
		{name: "cut-in-second-chunk", tag: 1, chunks: [][]byte{sack, data[:3]}, begins: true, sees: sawACK},
		{name: "no-chunk", tag: 1, broken: true},
		{name: "cut-chunk-header", tag: 1, chunks: [][]byte{data[:3]}, broken: true},
		{name: "length-0", tag: 1, chunks: [][]byte{{0, 0, 0, 0}}, broken: true},
		{name: "length-3-in-second", tag: 1, chunks: [][]byte{sack, {4, 0, 0, 3}}, broken: true},
		{name: "init-tag", tag: 1, chunks: [][]byte{init}, broken: true},
		{name: "init-data", chunks: [][]byte{init, data}, broken: true},
		{name: "data-of-none-init", tag: 1, chunks: [][]byte{sack, init}, broken: true},
		{name: "shutdown-complete-data", tag: 1, chunks: [][]byte{complete, data}, broken: true},
	}
}

// What a packet begins where there is no flow, both ways.
func TestSCTPBegins(t *testing.T) {
	d := load(t, 64)
	for _, f := range families {
		for _, test := range sctpCases() {
			d.each(f.name+"/"+test.name, func(d *datapath) {
				d.setRules(ruleSet{
					snat: []snatRule{{source: f.subnet, masquerade: true}},
					dnat: []dnatRule{publish(f, protoSCTP, one(3005), one(80))},
				})
				c := d.path(f, sctp).as(f.uplink, 0)
				sent, wire := c.out("", "")
				sent, wire = sent.chunksOf(test.tag, test.chunks...), wire.chunksOf(test.tag, test.chunks...)
				in := d.path(f, sctp)
				in.inside, in.outside = at(f.container, 80), at(f.uplink, 3005)
				published, seen := in.in("", "")
				published, seen = published.chunksOf(test.tag, test.chunks...), seen.chunksOf(test.tag, test.chunks...)
				switch {
				case test.begins:
					d.passes(toUplink(), sent, wire)
					d.passes(fromUplink(), published, seen)
				case test.broken:
					d.drops(fromBridge(), sent, bpf.NATCounterDROP_MALFORMED)
					d.drops(toUplink(), sent, bpf.NATCounterDROP_MALFORMED)
					d.untouched(fromUplink(), published)
				default:
					d.drops(toUplink(), sent, bpf.NATCounterDROP_TCP_UNEXPECTED)
					d.untouched(fromUplink(), published)
				}
				want := 0
				if test.begins {
					want = 4
				}
				if n := d.halves(); n != want {
					d.Errorf("%d halves, want %d:\n%s", n, want, d.allFlows())
				}
			})
		}
	}
}

// What a packet tells of a flow.
func TestSCTPSees(t *testing.T) {
	d := load(t, 64)
	for _, f := range families {
		for _, test := range sctpCases() {
			if test.broken {
				continue
			}
			d.each(f.name+"/"+test.name, func(d *datapath) {
				for _, tr := range translated[:2] {
					d.forget()
					c := tr.open(d, f, sctp)
					out := tuple{c.proto, c.inside, c.peer}
					before := sawRST
					if test.name == "init" { // which opens anew what an RST has closed
						before = sawACK
					}
					c.changeHalf(out, func(h *bpf.NATHalf) { h.Tcp = before })
					id := c.mustHalf(out).Standing.Id
					sent, wire := c.out("", "")
					d.passes(toUplink(), sent.chunksOf(test.tag, test.chunks...), wire.chunksOf(test.tag, test.chunks...))
					if h := c.mustHalf(out); h.Tcp != test.sees || h.Standing.Id != id {
						d.Errorf("%s: seen %d, want %d; id %d was %d", tr.name, h.Tcp, test.sees, h.Standing.Id, id)
					}
				}
			})
		}
	}
}

// An association's flow lasts as long as one of TCP in the same state.
func TestSCTPTimeouts(t *testing.T) {
	d := load(t, 64)
	f := families[0]
	lives := []struct {
		name    string
		life    func(c path)
		timeout bpf.NATTimeout
	}{
		{"init", func(c path) { c.sends("S", "") }, bpf.NATTimeoutTIMEOUT_TCP_TRANSITORY},
		{"init-ack", func(c path) { c.sends("S", ""); c.receives("SA", "") }, bpf.NATTimeoutTIMEOUT_TCP_TRANSITORY},
		{"established", func(c path) { c.sends("S", ""); c.receives("SA", ""); c.sends("A", "x") }, bpf.NATTimeoutTIMEOUT_TCP_ESTABLISHED},
		{"mid-stream", func(c path) { c.sends("A", "x"); c.receives("A", "x") }, bpf.NATTimeoutTIMEOUT_TCP_ESTABLISHED},
		{"shutdown", func(c path) { c.sends("A", "x"); c.receives("A", ""); c.sends("FA", "") }, bpf.NATTimeoutTIMEOUT_TCP_TRANSITORY},
		{"shutdown-both", func(c path) { c.sends("A", "x"); c.sends("FA", ""); c.receives("FA", "") }, bpf.NATTimeoutTIMEOUT_TCP_CLOSED},
		{"abort", func(c path) { c.sends("A", "x"); c.receives("A", ""); c.receives("R", "") }, bpf.NATTimeoutTIMEOUT_TCP_TRANSITORY},
		{"abort-undone", func(c path) { c.sends("A", "x"); c.receives("R", ""); c.receives("A", "") }, bpf.NATTimeoutTIMEOUT_TCP_ESTABLISHED},
	}
	for _, timeout := range []bpf.NATTimeout{
		bpf.NATTimeoutTIMEOUT_TCP_ESTABLISHED, bpf.NATTimeoutTIMEOUT_TCP_TRANSITORY, bpf.NATTimeoutTIMEOUT_TCP_CLOSED,
	} {
		t.Run(fmt.Sprint(timeout), func(t *testing.T) {
			d := *d
			d.TB = t
			d.reset()
			masquerade(&d, f)
			want := make(map[string]bool)
			for i, l := range lives {
				c := d.path(f, sctp).as(f.uplink, 0).by(f.container, 40000+uint16(i)).as(f.uplink, 40000+uint16(i))
				l.life(c)
				want[l.name] = l.timeout == timeout
			}
			// every other timer runs out
			d.configure(func(c *bpf.NATConfig) {
				for i := range c.Timeout {
					if bpf.NATTimeout(i) != timeout {
						c.Timeout[i] = 0
					}
				}
				c.Timeout[timeout] = 1 << 20
			})
			d.startExpiry()
			left := func() map[string]bool {
				there := make(map[string]bool)
				for i, l := range lives {
					c := d.path(f, sctp).as(f.uplink, 0).by(f.container, 40000+uint16(i))
					_, there[l.name] = d.half(tuple{c.proto, c.inside, c.peer})
				}
				return there
			}
			d.until(fmt.Sprintf("%v stay alone", want), 30*time.Second, func() bool { return maps.Equal(left(), want) })
		})
	}
}
