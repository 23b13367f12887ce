package judge

import (
	"encoding/binary"

	"tcnat/internal/lab"
)

// talk writes what is said in one flow.
type talk struct {
	*generator
	flow   flow
	number int
	steps  []step
	seq    [2]uint32 // of TCP, by side: the next to send
}

func (t *talk) say(from side, a action) {
	t.steps = append(t.steps, step{flow: t.number, from: from, shape: t.harm(), act: a})
}

func (t *talk) side() side { return side(t.IntN(2)) }

// segment sends a TCP segment with the sequence numbers that are due.
func (t *talk) segment(from side, flags uint8, payload []byte, blind bool) {
	s := tcpSegment{flags: flags, seq: t.seq[from], window: uint16(1000 + t.IntN(60000)), payload: payload}
	if flags&ack != 0 {
		s.ack = t.seq[from.other()]
	}
	if flags&syn != 0 {
		s.options = []byte{2, 4, 5, 0xb4, 4, 2, 1, 3, 1, 3, 3, 7} // MSS, SACK permitted, window scale
		t.seq[from]++
	} else if t.percent(30) {
		s.options = append([]byte{1, 1, 8, 10}, make([]byte, 8)...) // timestamps
		binary.BigEndian.PutUint32(s.options[4:], t.Uint32())
	}
	if flags&fin != 0 {
		t.seq[from]++
	}
	t.seq[from] += uint32(len(payload))
	t.say(from, tcpAction{s, blind})
}

// tcp writes connections on one tuple, one after the other.
func (t *talk) tcp() {
	for n := 1 + t.IntN(3)/2; n > 0; n-- {
		t.seq = [2]uint32{t.Uint32(), t.Uint32()}
		a := t.flow.initiator()
		b := a.other()
		open := true
		t.oneOf([]choice{
			{70, func() {
				t.segment(a, syn, nil, false)
				t.sometimesAgain(a)
				t.segment(b, syn|ack, nil, false)
				t.sometimesAgain(b)
				t.segment(a, ack, nil, false)
			}},
			{8, func() { // simultaneous open
				t.segment(a, syn, nil, false)
				t.segment(b, syn, nil, false)
				t.seq[0], t.seq[1] = t.seq[0]-1, t.seq[1]-1
				t.segment(a, syn|ack, nil, false)
				t.seq[b]++
				t.segment(b, syn|ack, nil, false)
			}},
			{6, func() {}}, // begun before anybody looked
			{6, func() { // refused
				t.segment(a, syn, nil, false)
				t.segment(b, rst|ack, nil, false)
				open = t.percent(10)
			}},
			{4, func() { t.segment(b, syn, nil, true) }},
			{3, func() { // nobody answers
				t.segment(a, syn, nil, false)
				open = false
			}},
			{3, func() { t.wild(a) }},
		})
		if !open {
			continue
		}
		for range t.IntN(8) {
			t.tcpEvent()
		}
		t.tcpClose(t.side())
	}
}

func (t *talk) sometimesAgain(from side) {
	if t.percent(6) {
		t.say(from, repeatAction{})
	}
}

// wild sends any flags at all.
func (t *talk) wild(from side) {
	t.segment(from, uint8(t.Uint32()), t.payload(20), false)
}

func (t *talk) tcpEvent() {
	from := t.side()
	t.oneOf([]choice{
		{40, func() { t.segment(from, psh|ack, t.payload(300), false); t.sometimesAgain(from) }},
		{20, func() { t.segment(from, ack, nil, false) }},
		{3, func() { t.segment(from, ack, t.payload(1360), false) }},
		{4, func() { t.say(from, repeatAction{}) }},
		{4, func() { // keep-alive
			t.seq[from]--
			t.segment(from, ack, nil, false)
			t.seq[from]++
		}},
		{3, func() { // a segment is lost on the way
			t.seq[from] += 100
			t.segment(from, psh|ack, t.payload(100), false)
		}},
		{2, func() { t.segment(from, psh|ack|urg, t.payload(10), false) }},
		{3, func() { t.wild(from) }},
		{14, func() { t.fail(t.side()) }},
		{2, func() { t.message(from) }},
	})
}

func (t *talk) tcpClose(a side) {
	b := a.other()
	t.oneOf([]choice{
		{45, func() {
			t.segment(a, fin|ack, nil, false)
			t.segment(b, ack, nil, false)
			for range t.IntN(3) { // half closed
				t.segment(b, psh|ack, t.payload(100), false)
				t.segment(a, ack, nil, false)
			}
			t.segment(b, fin|ack, nil, false)
			t.sometimesAgain(b)
			t.segment(a, ack, nil, false)
		}},
		{10, func() { // both at once
			t.segment(a, fin|ack, nil, false)
			t.segment(b, fin|ack, nil, false)
			t.segment(a, ack, nil, false)
			t.segment(b, ack, nil, false)
		}},
		{20, func() { t.segment(a, rst|ack, nil, false) }},
		{8, func() { t.segment(a, rst, nil, false) }},
		{17, func() {}},
	})
	switch {
	case t.percent(8):
		t.segment(t.side(), ack, t.payload(10), false) // late
	case t.percent(8):
		t.fail(t.side()) // about what is over
	case t.percent(4):
		t.segment(t.side(), rst, nil, false)
	}
}

// udp writes datagrams both ways, and some from elsewhere.
func (t *talk) udp() {
	a := t.flow.initiator()
	b := a.other()
	if t.percent(5) {
		t.say(b, udpAction{payload: t.payload(20), blind: true})
	}
	t.say(a, udpAction{payload: t.payload(100)})
	for range t.IntN(8) {
		from := t.side()
		t.oneOf([]choice{
			{30, func() { t.say(from, udpAction{payload: t.payload(300)}) }},
			{20, func() { t.say(b, udpAction{payload: t.payload(300)}) }},
			{3, func() { t.say(from, udpAction{payload: t.payload(1400)}) }},
			{3, func() { t.say(from, repeatAction{}) }},
			{6, func() { t.say(without, udpAction{payload: t.payload(30), otherPort: uint16(2 + t.IntN(5))}) }},
			{6, func() { t.say(without, udpAction{payload: t.payload(30), otherAddr: 1 + t.IntN(2)}) }},
			{3, func() { t.say(within, udpAction{payload: t.payload(30), otherPort: uint16(2 + t.IntN(5))}) }},
			{2, func() {
				t.say(without, udpAction{payload: t.payload(30), blind: true, toContainer: true, otherPort: uint16(t.IntN(2) * 7)})
			}},
			{16, func() { t.fail(t.side()) }},
			{2, func() { t.message(from) }},
		})
	}
}

// echoes writes requests and replies.
func (t *talk) echoes() {
	a := t.flow.initiator()
	b := a.other()
	if t.percent(5) {
		t.say(b, echoAction{reply: true, blind: true, payload: t.payload(20)})
	}
	for n := range 1 + t.IntN(5) {
		sequence, data := uint16(n), t.payload(100)
		t.say(a, echoAction{sequence: sequence, payload: data})
		if t.flow.inward {
			continue // the host itself answers
		}
		if t.percent(85) {
			t.say(b, echoAction{reply: true, sequence: sequence, payload: data})
		}
		switch {
		case t.percent(10):
			t.say(t.side(), repeatAction{})
		case t.percent(20):
			t.fail(t.side())
		case t.percent(3):
			t.say(b, echoAction{sequence: sequence}) // asks back
		case t.percent(3):
			t.say(a, echoAction{reply: true, sequence: sequence})
		case t.percent(5):
			t.message(t.side())
		}
	}
}

// fail sends an ICMP error about something.
func (t *talk) fail(from side) {
	e := errorAction{what: quoteHeard, cut: -1, noise: t.payload(60)}
	if t.family == lab.IPv4 {
		e.kind = []uint8{3, 3, 3, 3, 11, 11, 12, 4, 5}[t.IntN(9)]
		switch e.kind {
		case 3:
			e.code = uint8(t.IntN(16))
		case 11, 12:
			e.code = uint8(t.IntN(2))
		}
		if e.kind == 3 && e.code == 4 {
			e.rest = uint32(576 + t.IntN(900))
		} else if t.percent(10) {
			e.rest = t.Uint32()
		}
	} else {
		e.kind = []uint8{1, 1, 1, 1, 2, 3, 3, 4}[t.IntN(8)]
		switch e.kind {
		case 1:
			e.code = uint8(t.IntN(7))
		case 3:
			e.code = uint8(t.IntN(2))
		case 2:
			e.rest = uint32(1280 + t.IntN(200))
		case 4:
			e.code, e.rest = uint8(t.IntN(3)), uint32(t.IntN(60))
		}
	}
	if t.percent(25) {
		e.back = 1 + t.IntN(3)
	}
	t.oneOf([]choice{
		{40, func() {}},
		{30, func() { e.cut = 8 }},
		{10, func() { e.cut = t.IntN(64) }},
		{10, func() { e.extended = true }},
		{10, func() { e.cut = 8 + t.IntN(40) }},
	})
	t.oneOf([]choice{
		{80, func() {}},
		{5, func() { e.what = quoteSent }},
		{5, func() { e.what = quoteMangled }},
		{5, func() { e.what = quoteOther }},
		{5, func() { e.what = quoteNoise }},
	})
	if e.cut == 17 {
		e.cut = 16 // half of TCP's checksum tells which port was chosen
	}
	for len(e.noise) < 2 {
		e.noise = append(e.noise, byte(t.Uint32()))
	}
	e.byRouter = from == without && t.percent(50) || t.percent(5)
	t.say(from, e)
}

// message sends an ICMP message of some other type.
func (t *talk) message(from side) {
	m := messageAction{rest: t.Uint32(), payload: t.payload(40)}
	if t.family == lab.IPv4 {
		m.kind = []uint8{13, 14, 15, 17, 6, 30, 42, 200}[t.IntN(8)]
		if from == without && m.kind == 13 {
			m.kind = 14 // the host would answer with its time
		}
	} else {
		m.kind = []uint8{5, 100, 127, 139, 140, 144, 160, 200}[t.IntN(8)]
	}
	t.say(from, m)
}
