package bpf_test

import (
	"bytes"
	"encoding/binary"
	"maps"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"tcnat/bpf"
)

const (
	fragmentID = 0xbeef
	heldSlots  = 4 // fragments of a datagram that wait for its first
)

// cut cuts a packet into fragments of so many bytes, a multiple of 8, behind the IP header.
func (p packet) cut(size int, id uint32) (frames [][]byte) {
	whole, l4 := p.frame(), ethernetLen+p.headerLen()
	for at := 0; at < len(whole)-l4; at += size {
		end := min(at+size, len(whole)-l4)
		frames = append(frames, p.piece(at, whole[l4+at:l4+end], end < len(whole)-l4, id))
	}
	return frames
}

// piece is the fragment of a packet that has this body, where at bytes of it come before.
func (p packet) piece(at int, body []byte, more bool, id uint32) []byte {
	whole, l4 := p.frame(), ethernetLen+p.headerLen()
	part, word := bytes.Clone(whole[:l4]), uint16(at)
	if p.v6() {
		if more {
			word |= 1
		}
		next := ethernetLen + 6 // the last header's next
		for _, e := range p.extensions {
			if next == ethernetLen+6 {
				next = ethernetLen + 40
			} else {
				next += 1 + len(e.body)
			}
		}
		part = append(part, part[next], 0)
		part[next] = nextFragment
		part = binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint16(part, word), id)
		part = append(part, body...)
		binary.BigEndian.PutUint16(part[ethernetLen+4:], uint16(len(part)-ethernetLen-40))
		return part
	}
	word /= 8
	if more {
		word |= 0x2000
	}
	part = append(part, body...)
	ip := part[ethernetLen:l4]
	binary.BigEndian.PutUint16(ip[2:], uint16(len(part)-ethernetLen))
	binary.BigEndian.PutUint16(ip[4:], uint16(id))
	binary.BigEndian.PutUint16(ip[6:], word)
	binary.BigEndian.PutUint16(ip[10:], 0)
	binary.BigEndian.PutUint16(ip[10:], onesComplement(ip))
	return part
}

func onesComplement(b []byte) uint16 {
	var sum uint32
	for i := 0; i < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// sentBy collects the frames that pass a device while fn runs, until there are so many of them.
func (d *datapath) sentBy(ifindex uint32, n int, fn func()) (frames [][]byte) {
	d.Helper()
	all := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_ALL))
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	d.check(err)
	defer unix.Close(fd)
	d.check(unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: int(ifindex)}))
	fn()
	buffer := make([]byte, 65536)
	for deadline := time.Now().Add(2 * time.Second); len(frames) < n; {
		size, _, err := unix.Recvfrom(fd, buffer, 0)
		switch {
		case err == nil && isFragment(buffer[:size]):
			frames = append(frames, bytes.Clone(buffer[:size]))
		case err == nil:
		case time.Now().After(deadline):
			return frames
		default:
			time.Sleep(time.Millisecond)
		}
	}
	return frames
}

func isFragment(frame []byte) bool {
	if len(frame) < ethernetLen+20 {
		return false
	}
	if frame[ethernetLen]>>4 == 4 {
		return binary.BigEndian.Uint16(frame[ethernetLen+6:])&0x3fff != 0
	}
	return bytes.IndexByte([]byte{nextFragment, nextHopByHop}, frame[ethernetLen+6]) >= 0
}

// holds expects a later fragment to wait for its first.
func (d *datapath) holds(h hook, in []byte) {
	d.Helper()
	before := d.counts()
	verdict, _ := d.run(h, in)
	counted := d.counts().since(before)
	if verdict != shot || counted[bpf.NATCounterFRAGMENTS_HELD] != 1 || len(counted.drops()) > 0 {
		d.Fatalf("%s: verdict %d (counted: %s), want it held\n%s", h.program, int32(verdict), counted, describe(in))
	}
}

// releases expects a first fragment to become want, and to release those that are held, in any order.
func (d *datapath) releases(h hook, in, want []byte, held [][]byte) {
	d.Helper()
	d.releasesAs(unspec, h, in, want, held)
}

func (d *datapath) releasesAs(verdict uint32, h hook, in, want []byte, held [][]byte) {
	d.Helper()
	got := d.sentBy(h.skb.Ifindex, len(held), func() { d.leavesFrame(h, in, want, verdict) })
	// held without padding, and with the link header of the first
	var wanted [][]byte
	for _, frame := range held {
		wanted = append(wanted, append(bytes.Clone(in[:ethernetLen]), frame[ethernetLen:]...))
	}
	slices.SortFunc(got, bytes.Compare)
	slices.SortFunc(wanted, bytes.Compare)
	if !slices.EqualFunc(got, wanted, bytes.Equal) {
		d.Fatalf("%s: released %d fragments, want %d:\n%x\n%x", h.program, len(got), len(wanted), got, wanted)
	}
	if n := d.heldFragments(); n != 0 {
		d.Fatalf("%s: %d fragments are still held", h.program, n)
	}
}

func (d *datapath) heldFragments() int {
	d.Helper()
	return len(elements[bpf.NATHeldKey, bpf.NATHeldFragment](d, d.HeldFragments))
}

func (d *datapath) forgetFragments() {
	d.Helper()
	clearMap[bpf.NATDatagramKey, bpf.NATDatagram](d, d.Fragments)
	clearMap[bpf.NATHeldKey, bpf.NATHeldFragment](d, d.HeldFragments)
}

// ordered sends the fragments of a packet to a hook in this order: those before the first are held, and
// each becomes that of want.
func (d *datapath) ordered(h hook, in, want packet, size int, order []int) {
	d.Helper()
	d.orderedAs(unspec, h, in, want, size, order)
}

// orderedAs is ordered with another verdict on what is not held.
func (d *datapath) orderedAs(verdict uint32, h hook, in, want packet, size int, order []int) {
	d.Helper()
	d.forgetFragments()
	from, to := in.cut(size, fragmentID), want.cut(size, fragmentID)
	var held []int
	for i, n := range order {
		switch {
		case n == 0:
			var waiting [][]byte
			for _, n := range held {
				waiting = append(waiting, from[n])
			}
			d.releasesAs(verdict, h, from[0], to[0], waiting)
			for _, n := range held {
				d.leavesFrame(h, from[n], to[n], verdict)
			}
		case !slices.Contains(order[:i], 0):
			d.holds(h, from[n])
			held = append(held, n)
		default:
			d.leavesFrame(h, from[n], to[n], verdict)
		}
	}
}

// refuses expects the program to drop a first fragment for this reason, and the one that waits for it too.
func (d *datapath) refuses(h hook, first []byte, reason bpf.NATCounter) {
	d.Helper()
	before := d.counts()
	verdict, _ := d.run(h, first)
	got := d.counts().since(before).drops()
	if want := (counts{reason: 1, bpf.NATCounterDROP_FRAGMENT: 1}); verdict != shot || !maps.Equal(got, want) {
		d.Fatalf("%s: verdict %d, counted drops %s, want %s", h.program, int32(verdict), got, want)
	}
	if n := len(elements[bpf.NATHeldKey, bpf.NATHeldFragment](d, d.HeldFragments)); n != 0 {
		d.Errorf("%s: %d fragments wait still", h.program, n)
	}
}
