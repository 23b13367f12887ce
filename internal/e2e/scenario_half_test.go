package e2e

import (
	"bytes"
	"fmt"
	"io"
	"net/netip"
	"testing"
	"time"

	"tcnat/internal/lab"
	"tcnat/loader"
	"tcnat/maps"
)

// halfways are the ways in which one side speaks after the other has stopped: to a published port from
// the world, by hairpin, and from a container out.
func (r *rig) halfways(f lab.Family) []way {
	server, neighbour := r.Containers[0], r.Containers[1]
	published, inside := at(r.Host.Addr(f), 3005), at(server.Addr(f), 80)
	return []way{
		{"published", r.World, server, inside, published},
		{"hairpin", neighbour, server, inside, published},
		{"out", server, r.World, at(r.World.Loopback(f), 80), at(r.World.Loopback(f), 80)},
	}
}

// A side that has said all it wanted still gets all that the other says.
func TestHalfClosed(t *testing.T) {
	forEachMode(t, lab.Options{Containers: 2}, func(t *testing.T, r *rig, mode loader.AttachMode) {
		r.attach(t, loader.AttachOptions{Mode: mode})
		for _, f := range lab.Families() {
			r.publish(t, maps.SinglePort(3005), r.Containers[0].Addr(f), maps.SinglePort(80))
			for _, w := range r.halfways(f) {
				if err := halfClosed(t, w); err != nil {
					t.Errorf("%s, %s: %v", f, w.name, err)
				}
			}
		}
	})
}

func halfClosed(t *testing.T, w way) error {
	answer := bytes.Repeat([]byte("the answer to all that "), 20000)
	listener, err := w.server.ListenTCP(t.Context(), w.listen)
	if err != nil {
		return err
	}
	defer listener.Close()
	failed := make(chan error, 1)
	go func() {
		conn, err := listener.AcceptTCP()
		if err != nil {
			failed <- err
			return
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(lab.DefaultTimeout))
		question, err := io.ReadAll(conn) // until the client has closed its side
		if err == nil && string(question) != "question" {
			err = fmt.Errorf("the server heard %q", question)
		}
		if err == nil {
			_, err = conn.Write(answer)
		}
		failed <- err
	}()
	conn, err := w.client.DialTCP(t.Context(), netip.AddrPort{}, w.call)
	if err != nil {
		return err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(lab.DefaultTimeout))
	if _, err := conn.Write([]byte("question")); err != nil {
		return err
	}
	if err := conn.CloseWrite(); err != nil {
		return err
	}
	got, err := io.ReadAll(conn)
	if err != nil {
		return err
	}
	if !bytes.Equal(got, answer) {
		return fmt.Errorf("%d bytes of %d came, or others", len(got), len(answer))
	}
	return <-failed
}

// Datagrams that nobody answers arrive, and so do several answers to the last one.
func TestOneSided(t *testing.T) {
	forEachMode(t, lab.Options{Containers: 2}, func(t *testing.T, r *rig, mode loader.AttachMode) {
		r.attach(t, loader.AttachOptions{Mode: mode})
		for _, f := range lab.Families() {
			r.publish(t, maps.SinglePort(3005), r.Containers[0].Addr(f), maps.SinglePort(80))
			for _, w := range r.halfways(f) {
				if err := oneSided(w); err != nil {
					t.Errorf("%s, %s: %v", f, w.name, err)
				}
			}
		}
	})
}

func oneSided(w way) error {
	const datagrams = 20
	server, err := w.server.ListenUDP(w.listen)
	if err != nil {
		return err
	}
	defer server.Close()
	client, err := w.client.DialUDP(netip.AddrPort{}, w.call)
	if err != nil {
		return err
	}
	defer client.Close()
	deadline := time.Now().Add(lab.DefaultTimeout)
	_, _ = server.SetReadDeadline(deadline), client.SetReadDeadline(deadline)
	buffer := make([]byte, 100)
	var from netip.AddrPort
	for i := range datagrams {
		want := fmt.Sprint("datagram ", i)
		if _, err := client.Write([]byte(want)); err != nil {
			return err
		}
		n, sender, err := server.ReadFromUDPAddrPort(buffer)
		if err != nil || string(buffer[:n]) != want || i > 0 && sender != from {
			return fmt.Errorf("%q from %s, error %w, want %q from %s", buffer[:n], sender, err, want, from)
		}
		from = sender
	}
	for i := range datagrams {
		want := fmt.Sprint("answer ", i)
		if _, err := server.WriteToUDPAddrPort([]byte(want), from); err != nil {
			return err
		}
		if n, err := client.Read(buffer); err != nil || string(buffer[:n]) != want {
			return fmt.Errorf("%q, error %w, want %q", buffer[:n], err, want)
		}
	}
	return nil
}
