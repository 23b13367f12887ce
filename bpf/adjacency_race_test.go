package bpf_test

import (
	"bytes"
	"math/rand/v2"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tcnat/bpf"
)

// Two CPUs use leases while adjacencies are handed on from one container to another: no packet ever
// gets the link header of another container than its own. The table has room for a few only: all
// else in it is in use. Containers speak in turns, so that some are long silent; what has not been
// used for longer than a lease lasts is aged, as ten seconds would do.
const (
	someRoom     = 12
	roomAt       = 5000
	manyStations = 24
	shortTurn    = 375 * time.Millisecond
	silence      = 2100 * time.Millisecond // more than a lease
)

type talker struct {
	path
	mac macs
}

// talkers answers containers whose adjacencies have their place in the free part of the table.
func talkers(d *datapath, f family, empty func()) (all []talker) {
	d.Helper()
	var c path
	for try, opened := uint32(0), -1; len(all) < manyStations; try++ {
		if try > 200000 {
			d.Fatal("no addresses fall into the free part of the table")
		}
		n := len(all)
		mac := macs{net.HardwareAddr{2, 8, byte(try >> 24), byte(try >> 16), byte(try >> 8), byte(try)}}
		if opened != n {
			c, opened = d.path(f, udp).as(f.uplink, 0).by(f.containerAt(n), 40000).open(), n
		}
		c.changeHalf(c.inTuple(), func(h *bpf.NATHalf) { h.Lease = bpf.NATHalf{}.Lease })
		_, seen := c.in("", "x")
		d.untouched(toBridge(), seen.forwarded().between(bridgeMAC, mac))
		if d.mustHalf(c.inTuple()).Lease.Out >= firstAdjacency {
			all = append(all, talker{c, mac})
			c.changeHalf(c.inTuple(), func(h *bpf.NATHalf) { h.Lease = bpf.NATHalf{}.Lease })
			empty()
		}
	}
	return all
}

func TestAdjacencyRace(t *testing.T) {
	all := cpus(t)
	if len(all) < 2 {
		t.Skip("needs two CPUs")
	}
	lasts := 8 * time.Second
	if testing.Short() {
		lasts = 3 * time.Second
	}
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			d := load(t, 256)
			masquerade(d, f)
			d.setFast(bpf.NATFastPathFAST_PATH_ESTABLISHED, false)
			d.crowd()
			// the uplink's own adjacency gets a place that stays
			uplink := d.place(f)
			speakers := talkers(d, f, func() { d.emptyRoom(uplink) })
			var turns atomic.Int64
			var stop atomic.Bool
			var running sync.WaitGroup
			began := time.Now()
			type result struct {
				redirected, slow int
				wrong            string
			}
			results := make([]result, 2)
			for i := range results {
				r := rand.New(rand.NewPCG(uint64(i), uint64(time.Now().UnixNano())))
				running.Add(1)
				go func() {
					defer running.Done()
					runtime.LockOSThread()
					var set unix.CPUSet
					set.Set(all[i])
					_ = unix.SchedSetaffinity(0, &set)
					w := &worker{datapath: d, Rand: r, family: f, outcome: make(map[string]int)}
					for !stop.Load() && results[i].wrong == "" {
						s := speakers[(int(turns.Load())*2+r.IntN(2))%len(speakers)]
						arrived, seen := s.fastIn("", "x")
						verdict, out := w.runOnce(fromUplink(), arrived.frame())
						want := seen.between(bridgeMAC, s.mac)
						if verdict == redirect {
							results[i].redirected++
							if !bytes.Equal(out, want.frame()) {
								results[i].wrong = describe(out) + "want\n" + describe(want.frame())
							}
							continue
						}
						results[i].slow++
						w.runOnce(toBridge(), want.frame())
					}
				}()
			}
			handed := 0
			last := make(map[int]time.Time) // when an adjacency was last seen to be used
			used := make(map[int]uint32)
			owner := make(map[int][6]uint8)
			for time.Since(began) < lasts {
				turns.Store(int64(time.Since(began) / shortTurn))
				now := time.Now()
				for i := roomAt; i < roomAt+someRoom; i++ {
					a := d.adjacency(uint16(i))
					if a.State != bpf.NATAdjacencyStateADJACENCY_READY {
						continue
					}
					if a.Used != used[i] {
						if was, ok := owner[i]; ok && was != a.Remote {
							handed++
						}
						used[i], last[i], owner[i] = a.Used, now, a.Remote
						continue
					}
					if i != int(uplink) && now.Sub(last[i]) > silence && !speaksSoon(speakers, a.Remote, int(turns.Load())) {
						a.Used -= adjacencyStamps + leaseStamps
						d.check(d.Adjacencies.Put(uint32(i), a))
						used[i], last[i] = a.Used, now
					}
				}
				time.Sleep(5 * time.Millisecond)
			}
			stop.Store(true)
			running.Wait()
			for _, r := range results {
				t.Logf("%d redirected, %d slow", r.redirected, r.slow)
				if r.wrong != "" {
					t.Error(r.wrong)
				}
				if r.redirected == 0 {
					t.Error("nothing was redirected")
				}
			}
			t.Logf("%d adjacencies handed on, counted %s", handed, d.counts())
			if handed == 0 && !testing.Short() {
				t.Error("no adjacency was handed on: the test has tested nothing")
			}
		})
	}
}

// speaksSoon answers whether the container with that address may be sending now or in the next turns.
func speaksSoon(all []talker, mac [6]uint8, turn int) bool {
	for ahead := range 3 {
		for n := range 2 {
			if bytes.Equal(all[((turn+ahead)*2+n)%len(all)].mac.mac, mac[:]) {
				return true
			}
		}
	}
	return false
}

// crowd fills the table but for someRoom places.
func (d *datapath) crowd() {
	d.Helper()
	full := make([]bpf.NATAdjacency, d.Adjacencies.MaxEntries())
	for i := range full {
		if i < roomAt || i >= roomAt+someRoom {
			full[i] = bpf.NATAdjacency{Used: d.now(), State: bpf.NATAdjacencyStateADJACENCY_READY, Ifindex: uint32(100000 + i)}
		}
	}
	d.putAdjacencies(full)
}

// emptyRoom frees the places again, but one.
func (d *datapath) emptyRoom(but uint16) {
	d.Helper()
	for i := uint32(roomAt); i < roomAt+someRoom; i++ {
		if i != uint32(but) {
			d.check(d.Adjacencies.Put(i, bpf.NATAdjacency{}))
		}
	}
}

// place finds the window of the uplink's adjacency by making room everywhere for a moment, and
// leaves it there.
func (d *datapath) place(f family) uint16 {
	d.Helper()
	d.putAdjacencies(make([]bpf.NATAdjacency, d.Adjacencies.MaxEntries()))
	c := d.path(f, udp).as(f.uplink, 0).by(f.container, 50000).open()
	_, seen := c.in("", "x")
	d.untouched(toBridge(), seen.forwarded().between(bridgeMAC, containerMAC))
	in := d.mustHalf(c.inTuple()).Lease.In
	a := d.adjacency(in)
	d.crowd()
	d.check(d.Adjacencies.Put(uint32(in), a))
	return in
}
