package e2e

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"

	"tcnat/bpf"
	"tcnat/internal/lab"
	"tcnat/loader"
	"tcnat/maps"
)

// Flows that idle past their timers are gone from every map, with no process that helps.
func TestIdleFlowsEnd(t *testing.T) {
	const short = 200 * time.Millisecond
	timeouts := maps.Timeouts{
		TCPEstablished: short, TCPTransitory: short, TCPClosed: short,
		UDP: short, UDPNew: short, UDPWellKnown: short, ICMP: short,
	}
	forEachMode(t, lab.Options{}, func(t *testing.T, r *rig, mode loader.AttachMode) {
		c := r.Containers[0]
		r.attach(t, loader.AttachOptions{Mode: mode})
		for _, f := range lab.Families() {
			r.publish(t, maps.SinglePort(3005), c.Addr(f), maps.PortRange{})
		}
		before := r.elements(t)
		for _, f := range lab.Families() {
			mustPing(t, c, r.World.Loopback(f), lab.PingOptions{})
			for _, protocol := range protocols() {
				server := at(r.World.Loopback(f), 7)
				call{protocol, c, r.World, server, server}.mustSee(t, r.Host.Addr(f))
				call{protocol, r.World, c, at(c.Addr(f), 3005), at(r.Host.Addr(f), 3005)}.mustSee(t, r.World.Addr(f))
			}
			// Nobody answers: a flow of which one direction is seen.
			conn, err := r.Containers[0].DialUDP(at(c.Addr(f), 50000), at(r.World.Loopback(f), 9))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if _, err := conn.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
		}
		if during := r.elements(t); during["flows"] < before["flows"]+2*12 {
			t.Fatalf("elements before %v, with 12 flows %v", before, during)
		}
		r.attach(t, loader.AttachOptions{Mode: mode, Timeouts: &timeouts}) // they hold for flows that are there
		var now map[string]int
		poll(t, "elements are as before", func() bool {
			now = r.elements(t)
			return cmp.Equal(before, now)
		})
		if diff := cmp.Diff(before, now); diff != "" {
			t.Errorf("elements before and after (-before +after):\n%s", diff)
		}
		// And it works as on the first day.
		for _, f := range lab.Families() {
			mustPing(t, c, r.World.Loopback(f), lab.PingOptions{})
		}
		r.mustNotDrop(t)
	})
}

// A conversation that goes on outlives its timer.
func TestBusyFlowStays(t *testing.T) {
	const timeout = 1500 * time.Millisecond
	timeouts := maps.DefaultTimeouts()
	timeouts.UDP, timeouts.UDPNew, timeouts.UDPWellKnown = timeout, timeout, timeout
	r := newRig(t, lab.Options{})
	r.attach(t, loader.AttachOptions{Timeouts: &timeouts})
	echo, err := lab.StartUDPEcho(r.World, at(r.World.Loopback(lab.IPv4), 4000))
	if err != nil {
		t.Fatal(err)
	}
	defer echo.Close()
	from := at(r.Containers[0].Addr(lab.IPv4), 40000)
	id := uint32(0)
	last := time.Now()
	for end := last.Add(4 * timeout); time.Now().Before(end); time.Sleep(timeout / 4) {
		if time.Since(last) > timeout/2 {
			id = 0 // the test was held up, and the flow was not busy
		}
		if _, err := lab.ExchangeUDP(t.Context(), r.Containers[0], from, echo.Addr, []byte("x")); err != nil {
			t.Fatal(err)
		}
		last = time.Now()
		r.read(t, func(d *loader.Datapath) error {
			flows, _, err := d.State().Flows()
			if err != nil || len(flows) != 1 {
				return fmt.Errorf("%d flows, want 1: %w", len(flows), err)
			}
			if id == 0 {
				id = flows[0].ID
			}
			if flows[0].ID != id {
				t.Errorf("flow %d was replaced by %d", id, flows[0].ID)
			}
			return nil
		})
	}
}

// elements counts the raw elements of every pinned map that has keys to walk, by name. Of a
// queue it tells whether it is empty.
func (r *rig) elements(t *testing.T) map[string]int {
	t.Helper()
	counts := make(map[string]int)
	err := filepath.WalkDir(r.inst.Dir(), func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() || filepath.Base(filepath.Dir(path)) != "maps" {
			return err
		}
		m, err := ebpf.LoadPinnedMap(path, nil)
		if err != nil {
			return err
		}
		defer m.Close()
		switch m.Type() {
		case ebpf.Hash, ebpf.LRUHash, ebpf.LPMTrie:
			counts[entry.Name()], err = keys(m)
		case ebpf.Queue:
			counts[entry.Name()] = 1
			if err := m.Lookup(nil, make([]byte, m.ValueSize())); errors.Is(err, ebpf.ErrKeyNotExist) {
				counts[entry.Name()] = 0
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	r.read(t, func(d *loader.Datapath) error {
		elements, err := d.State().Elements()
		counts[bpf.NATMapMappings] = elements[bpf.NATMapMappings] // an array's places that are taken
		return err
	})
	return counts
}

func keys(m *ebpf.Map) (int, error) {
	n := 0
	key, err := m.NextKeyBytes(nil)
	for ; err == nil && key != nil; n++ {
		key, err = m.NextKeyBytes(key)
	}
	return n, err
}
