package e2e

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"tcnat/internal/lab"
	"tcnat/maps"
)

// beat is the time between two questions of a talk.
const beat = 5 * time.Millisecond

// The kinds of messages of a talk, of a fixed size so that TCP needs no more framing.
const (
	question    = 'q'
	answer      = 'a'
	messageSize = 16
)

// talk is a conversation in which either side can ask, and the other answers.
type talk struct {
	name     string
	protocol maps.Protocol
	client   *end
	server   *end
	callee   netip.AddrPort // what the client calls
}

// end is one side of a talk.
type end struct {
	conn  net.Conn
	local netip.AddrPort
	write func([]byte) error

	questions atomic.Uint64 // that have come
	answers   atomic.Uint64
	asked     atomic.Uint64
	last      atomic.Int64 // when a question came last, in ns
	failed    atomic.Pointer[error]

	stop chan struct{} // of beat
	done sync.WaitGroup
}

// way is how a talk passes the host.
type way struct {
	name           string // snat or dnat
	client, server *lab.Node
	listen, call   netip.AddrPort
}

// talkPort is where servers are by default; published is the port that leads to it.
const talkPort = 7000

func published(port uint16) uint16 { return port + 1000 }

// ways are the two through the uplink to world: out by SNAT, and in by a published port, which
// this publishes.
func (r *rig) ways(t *testing.T, c *lab.Node, f lab.Family, port uint16) []way {
	t.Helper()
	r.publish(t, maps.SinglePort(published(port)), c.Addr(f), maps.SinglePort(port))
	outside := at(r.World.Loopback(f), port)
	return []way{
		{"snat", c, r.World, outside, outside},
		{"dnat", r.World, c, at(c.Addr(f), port), at(r.Host.Addr(f), published(port))},
	}
}

// talkAll starts a talk over TCP and UDP each way for both families.
func (r *rig) talkAll(t *testing.T, c *lab.Node, port uint16) []*talk {
	t.Helper()
	var talks []*talk
	for _, f := range lab.Families() {
		for _, w := range r.ways(t, c, f, port) {
			for _, protocol := range protocols() {
				talks = append(talks, w.start(t, protocol))
			}
		}
	}
	return talks
}

// start begins a talk: the client has asked once, and was answered.
func (w way) start(t *testing.T, protocol string) *talk {
	t.Helper()
	k := &talk{name: name(w.name, protocol, lab.FamilyOf(w.call.Addr())), callee: w.call}
	var err error
	if protocol == "tcp" {
		k.protocol = maps.TCP
		k.client, k.server, err = w.connect(t)
	} else {
		k.protocol = maps.UDP
		k.client, k.server, err = w.datagrams(t)
	}
	if err == nil {
		err = k.ask(k.client)
	}
	if err != nil {
		t.Fatalf("%s: %v", k.name, err)
	}
	return k
}

func (w way) connect(t *testing.T) (client, server *end, err error) {
	listener, err := w.server.ListenTCP(t.Context(), w.listen)
	if err != nil {
		return nil, nil, err
	}
	defer listener.Close()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	conn, err := w.client.DialTCP(ctx, netip.AddrPort{}, w.call)
	if err != nil {
		return nil, nil, err
	}
	if err := listener.SetDeadline(time.Now().Add(patience)); err != nil {
		return nil, nil, err
	}
	accepted, err := listener.Accept()
	if err != nil {
		return nil, nil, err
	}
	return newEnd(t, conn, nil), newEnd(t, accepted, nil), nil
}

func (w way) datagrams(t *testing.T) (client, server *end, err error) {
	listener, err := w.server.ListenUDP(w.listen)
	if err != nil {
		return nil, nil, err
	}
	conn, err := w.client.DialUDP(netip.AddrPort{}, w.call)
	if err != nil {
		return nil, nil, errors.Join(err, listener.Close())
	}
	peer := new(atomic.Pointer[netip.AddrPort])
	return newEnd(t, conn, nil), newEnd(t, listener, peer), nil
}

// newEnd answers what comes until the test ends. peer is whom a socket that is not connected has
// heard last.
func newEnd(t *testing.T, conn net.Conn, peer *atomic.Pointer[netip.AddrPort]) *end {
	e := &end{conn: conn}
	e.local, _ = netip.ParseAddrPort(conn.LocalAddr().String())
	read := func(b []byte) error { _, err := io.ReadFull(conn, b); return err }
	e.write = func(b []byte) error { _, err := conn.Write(b); return err }
	if peer != nil {
		udp := conn.(*net.UDPConn)
		read = func(b []byte) error {
			_, from, err := udp.ReadFromUDPAddrPort(b)
			if err == nil {
				peer.Store(&from)
			}
			return err
		}
		e.write = func(b []byte) error {
			_, err := udp.WriteToUDPAddrPort(b, *peer.Load())
			return err
		}
	}
	e.done.Go(func() {
		message := make([]byte, messageSize)
		for {
			err := read(message)
			_, isUDP := conn.(*net.UDPConn)
			switch {
			case errors.Is(err, net.ErrClosed) || errors.Is(err, os.ErrDeadlineExceeded):
				return
			case err != nil && isUDP: // an ICMP error about an earlier datagram
				continue
			case err != nil:
				e.failed.Store(&err)
				return
			}
			if message[0] == answer {
				e.answers.Add(1)
				continue
			}
			e.questions.Add(1)
			e.last.Store(time.Now().UnixNano())
			message[0] = answer
			_ = e.write(message)
		}
	})
	t.Cleanup(func() {
		e.pause()
		_ = conn.Close()
		e.done.Wait()
	})
	return e
}

// ask sends a question, and nothing else, and waits for the answer.
func (k *talk) ask(e *end) error {
	before := e.answers.Load()
	if err := e.question(); err != nil {
		return err
	}
	for deadline := time.Now().Add(slowly(lab.DefaultTimeout)); e.answers.Load() == before; time.Sleep(time.Millisecond) {
		if failed := e.failed.Load(); failed != nil {
			return *failed
		}
		if time.Now().After(deadline) {
			return lab.ErrNoReply
		}
	}
	return nil
}

func (e *end) question() error {
	message := make([]byte, messageSize)
	message[0] = question
	binary.BigEndian.PutUint64(message[8:], e.asked.Add(1))
	return e.write(message)
}

// goOn has an end ask on and on, until pause.
func (e *end) goOn() {
	e.stop = make(chan struct{})
	stop := e.stop
	e.done.Go(func() {
		ticker := time.NewTicker(beat)
		defer ticker.Stop()
		for {
			select {
			case <-stop:
				return
			case <-ticker.C:
				if tcp, ok := e.conn.(*net.TCPConn); ok { // a full buffer must not hold up pause
					_ = tcp.SetWriteDeadline(time.Now().Add(patience))
				}
				_ = e.question()
			}
		}
	})
}

// settle waits until an end has read what has come, as its count tells that is to stand still.
func (e *end) settle(t *testing.T, count *atomic.Uint64) {
	t.Helper()
	poll(t, e.local.String()+" has read what has come", func() bool {
		before := count.Load()
		time.Sleep(slowly(20 * beat))
		return count.Load() == before
	})
}

func (e *end) pause() {
	if e.stop != nil {
		close(e.stop)
		e.stop = nil
	}
}

// goOn has the clients of all talks ask on and on, and with both the servers as well.
func goOn(talks []*talk, both bool) {
	for _, k := range talks {
		k.client.goOn()
		if both {
			k.server.goOn()
		}
	}
}

func pause(talks []*talk) {
	for _, k := range talks {
		k.client.pause()
		k.server.pause()
	}
}

// mustGoOn wants more answers to the clients of all talks: the first of them within some time.
func mustGoOn(t *testing.T, talks []*talk, within time.Duration) {
	t.Helper()
	const more = 20
	before := make([]uint64, len(talks))
	for i, k := range talks {
		before[i] = k.client.answers.Load()
	}
	began := time.Now()
	deadline := began.Add(slowly(within + more*beat))
	for i, k := range talks {
		for k.client.answers.Load() < before[i]+more {
			if time.Now().After(deadline.Add(stalledSince(began))) {
				t.Errorf("%s: %d answers more in %s", k.name, k.client.answers.Load()-before[i], within)
				break
			}
			time.Sleep(time.Millisecond)
		}
	}
}

// flow finds the talk's flow.
func (k *talk) flow(flows []maps.Flow) (maps.Flow, error) {
	for _, flow := range flows {
		if flow.Original.Protocol == k.protocol && flow.Original.Src == k.client.local && flow.Original.Dst == k.callee {
			return flow, nil
		}
	}
	return maps.Flow{}, fmt.Errorf("%s: no flow from %s to %s", k.name, k.client.local, k.callee)
}
