package loader

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"tcnat/bpf"
	state "tcnat/maps"
)

func (h *host) setLive(live bool) {
	h.t.Helper()
	d, err := OpenForWrite(h.inst)
	must(h.t, err)
	defer d.Close()
	must(h.t, d.State().SetLive(live))
}

// TestKilled builds what a run leaves that is killed at each of its steps.
func TestKilled(t *testing.T) {
	steps := map[string]func(h *host){
		"before the rename": func(h *host) {
			h.setLive(false)
			must(h.t, os.Rename(h.inst.Dir(), h.inst.staged()))
		},
		"while staging": func(h *host) {
			h.setLive(false)
			must(h.t, os.Rename(h.inst.Dir(), h.inst.staged()))
			must(h.t, removeTree(pinsIn(h.inst.staged()).progs()))
			must(h.t, os.Remove(filepath.Join(pinsIn(h.inst.staged()).maps(), bpf.NATMapConfig)))
		},
		"before live": func(h *host) { h.setLive(false) },
		"while retiring": func(h *host) {
			h.setLive(false)
			must(h.t, os.Rename(h.inst.Dir(), h.inst.retired()))
			must(h.t, removeTree(pinsIn(h.inst.retired()).links()))
		},
		"after making a qdisc": func(h *host) {
			h.setLive(false)
			must(h.t, os.Rename(h.inst.Dir(), h.inst.staged()))
			must(h.t, os.MkdirAll(pinsIn(h.inst.staged()).qdiscMark(uint32(h.index("eth1"))), 0o700))
			h.addQdisc("eth1", foreignClsact())
		},
		"pins lost": func(h *host) { must(h.t, removePins(h.inst.Dir())) },
	}
	for name, kill := range steps {
		for _, mode := range []AttachMode{TCX, Clsact} {
			t.Run(name+"/"+mode.String(), func(t *testing.T) {
				h := newHost(t)
				h.attach(h.options(mode))
				kill(h)
				if status := h.attach(h.options(mode)); !status.Live {
					t.Error("not live")
				}
				kill(h)
				_, err := Detach(context.Background(), h.inst)
				must(t, err)
				h.wantNothing()
			})
		}
	}
}

// removePins removes pins without detaching, as unmounting does.
func removePins(dir string) error {
	var dirs []string
	err := filepath.WalkDir(dir, func(path string, entry os.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			dirs = append(dirs, path)
			return err
		}
		return os.Remove(path)
	})
	for i := len(dirs) - 1; i >= 0 && err == nil; i-- {
		err = os.Remove(dirs[i])
	}
	return err
}

const killedEnv = "TCNAT_LOADER_TEST_KILLED"

// TestChildAttach is the process that TestKilledAnywhere kills.
func TestChildAttach(t *testing.T) {
	name := os.Getenv(killedEnv)
	if name == "" {
		t.Skip("for TestKilledAnywhere")
	}
	inNetns(t, name)
	h := &host{t: t, inst: Instance{Name: name}}
	for version := int32(100); ; version++ {
		opts := h.options(Clsact)
		if os.Getenv(killedEnv+"_TCX") != "" {
			opts.Mode = TCX
		}
		opts.Spec = small(version)
		opts.FastPath = FastPathEstablished
		if version%3 != 0 {
			opts.Cgroup = os.Getenv(killedEnv + "_CGROUP")
		}
		_, err := Attach(context.Background(), h.inst, opts, nil)
		must(t, err)
		if version%2 == 0 {
			_, err := Detach(context.Background(), h.inst)
			must(t, err)
		}
	}
}

// TestKilledAnywhere kills processes that attach, upgrade and detach in turn at any instant.
// The next attach must put all in order, and a detach leave nothing.
func TestKilledAnywhere(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	random := rand.New(rand.NewPCG(seed, 0))
	t.Logf("seed %d", seed)
	h := newHost(t)
	h.container("veth1", mac1)
	h.container("veth2", mac2)
	nft(t, trackingRules)
	before := sysctls(t)
	cgroup := newCgroup(t, h.inst.Name)
	for round := range 12 {
		mode, env := Clsact, ""
		if round%2 == 0 && automatic(t) == state.AttachTCX {
			mode, env = TCX, killedEnv+"_TCX=1"
		}
		child := exec.Command("/proc/self/exe", "-test.run", "^TestChildAttach$")
		child.Env = append(os.Environ(), killedEnv+"="+h.netns, killedEnv+"_CGROUP="+cgroup, env)
		child.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		var output bytes.Buffer
		child.Stdout, child.Stderr = &output, &output
		must(t, child.Start())
		time.Sleep(time.Duration(random.IntN(1500)) * time.Millisecond) // the instant to kill at
		must(t, child.Process.Kill())
		err := child.Wait()
		if status, ok := child.ProcessState.Sys().(syscall.WaitStatus); !ok || !status.Signaled() {
			t.Fatalf("round %d: the child ended by itself: %v\n%s", round, err, output.String())
		}
		if round%3 != 2 {
			opts := h.options(mode)
			opts.Cgroup = cgroup
			if status := h.attach(opts); !status.Live || len(hostProgramsOn(t, cgroup)) != len(hostHooks()) {
				t.Errorf("round %d: live %v, on the cgroup %v", round, status.Live, hostProgramsOn(t, cgroup))
			}
		}
		_, err = Detach(context.Background(), h.inst)
		must(t, err)
		h.wantNothing()
		if left := hostProgramsOn(t, cgroup); len(left) > 0 {
			t.Errorf("round %d: left on the cgroup: %v", round, left)
		}
		if got := sysctls(t); got != before {
			t.Fatalf("round %d: sysctls %v, want %v", round, got, before)
		}
	}
}

func TestInterruptedUpgrade(t *testing.T) {
	h := newHost(t)
	h.attach(h.options(TCX))
	// Staged programs, one of them on a hook already.
	d, err := OpenForWrite(h.inst)
	must(t, err)
	spec, err := small(3)()
	must(t, err)
	loaded, err := loadOnto(spec, d.tables.maps)
	must(t, err)
	p := pinsIn(h.inst.Dir())
	must(t, os.Mkdir(p.progs()+"+new", 0o700))
	must(t, pinAll(p.progs()+"+new", loaded.progs))
	l, err := loadTCX(p.tcxPin(uint32(h.index("eth0")), hook{ingress: true}))
	must(t, err)
	must(t, l.Update(loaded.progs[bpf.NATProgFromUplink]))
	l.Close()
	loaded.close()
	must(t, d.Close())
	status, err := h.status()
	must(t, err)
	if len(status.Problems) != 1 {
		t.Errorf("problems %q, want one about the hook with another build", status.Problems)
	}
	_, progs := h.ids()
	h.attach(h.options(Auto))
	if _, after := h.ids(); after[bpf.NATProgFromUplink] != progs[bpf.NATProgFromUplink] {
		t.Error("the pinned programs were this build, and are gone")
	}
	h.detach()
}

func TestDamage(t *testing.T) {
	foreignMap := func(t *testing.T) *ebpf.Map {
		m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
		must(t, err)
		t.Cleanup(func() { m.Close() })
		return m
	}
	cases := []struct {
		name   string
		damage func(h *host, p pins)
		mends  bool // by attach; else only detach helps
		want   error
	}{
		{"map missing", func(h *host, p pins) {
			must(h.t, os.Remove(filepath.Join(p.maps(), bpf.NATMapFlows)))
		}, false, ErrCorrupt},
		{"config missing", func(h *host, p pins) {
			must(h.t, os.Remove(filepath.Join(p.maps(), bpf.NATMapConfig)))
		}, false, ErrCorrupt},
		{"another map", func(h *host, p pins) {
			path := filepath.Join(p.maps(), bpf.NATMapConfig)
			must(h.t, os.Remove(path))
			must(h.t, foreignMap(h.t).Pin(path))
		}, false, ErrCorrupt},
		{"empty directory", func(h *host, p pins) {
			must(h.t, removeTree(string(p)))
		}, false, ErrCorrupt},
		{"another version", func(h *host, p pins) {
			must(h.t, os.Rename(string(p), filepath.Join(h.inst.Dir(), "v999")))
		}, false, ErrOtherABI},
		{"program missing", func(h *host, p pins) {
			must(h.t, os.Remove(filepath.Join(p.progs(), bpf.NATProgToUplink)))
		}, true, ErrCorrupt},
		{"link missing", func(h *host, p pins) {
			needTCX(h.t)
			must(h.t, os.Remove(p.tcxPin(uint32(h.index("eth0")), hook{ingress: true})))
		}, true, nil},
		{"a map for a link", func(h *host, p pins) {
			needTCX(h.t)
			path := p.tcxPin(uint32(h.index("eth0")), hook{ingress: false})
			must(h.t, os.Remove(path))
			must(h.t, foreignMap(h.t).Pin(path))
		}, true, nil},
		{"link detached", func(h *host, p pins) {
			needTCX(h.t)
			l, err := loadTCX(p.tcxPin(uint32(h.index("eth0")), hook{ingress: false}))
			must(h.t, err)
			defer l.Close()
			must(h.t, l.Detach())
		}, true, nil},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			h := newHost(t)
			h.attach(h.options(Auto))
			c.damage(h, pinsIn(h.inst.Dir()))
			status, err := h.status()
			for end := time.Now().Add(patience); err == nil && len(status.Problems) > 1 && time.Now().Before(end); status, err = h.status() {
				time.Sleep(5 * time.Millisecond) // until the kernel has ended a link without pin
			}
			if c.want != nil && !errors.Is(err, c.want) {
				t.Errorf("status: %v, want %v", err, c.want)
			}
			if c.want == nil && (err != nil || len(status.Problems) != 1) {
				t.Errorf("status: error %v, problems %q, want one", err, status.Problems)
			}
			if c.mends {
				h.attach(h.options(Auto))
			} else if _, err := Attach(context.Background(), h.inst, h.options(Auto), nil); !errors.Is(err, c.want) {
				t.Errorf("attach: %v, want %v", err, c.want)
			}
			h.detach()
		})
	}
}

// TestPreallocate: the flows' memory is taken at once if that is asked for at first, and upgrades
// keep the tables as they are.
func TestPreallocate(t *testing.T) {
	h := newHost(t)
	taken := func() uint64 {
		d, err := Open(h.inst)
		must(t, err)
		defer d.Close()
		info, err := d.tables.maps[bpf.NATMapFlows].Info()
		must(t, err)
		bytes, ok := info.Memlock()
		if !ok {
			t.Skip("the kernel does not say what a map takes")
		}
		return bytes
	}
	opts := h.options(TCX)
	opts.MaxFlows = 20000
	if h.attach(opts).Preallocated {
		t.Error("preallocated without being asked")
	}
	empty := taken()
	opts.Preallocate = true
	if _, err := Attach(context.Background(), h.inst, opts, nil); !errors.Is(err, ErrConflict) {
		t.Errorf("preallocate tables that are there: %v, want %v", err, ErrConflict)
	}
	h.detach()
	if !h.attach(opts).Preallocated {
		t.Error("not preallocated")
	}
	if full := taken(); full < empty+40000*(48+40+96) {
		t.Errorf("40,000 halves take %d bytes, %d without preallocation", full, empty)
	}
	opts.Preallocate, opts.Spec = false, small(1)
	if !h.attach(opts).Preallocated {
		t.Error("not preallocated after an upgrade")
	}
	h.detach()
}

// TestFlowsSurviveUpgrade: what is in the maps before is in them after.
func TestFlowsSurviveUpgrade(t *testing.T) {
	h := newHost(t)
	h.attach(h.options(Auto))
	count := func() int {
		d, err := Open(h.inst)
		must(t, err)
		defer d.Close()
		elements, err := d.State().Elements()
		must(t, err)
		return elements[bpf.NATMapMappings]
	}
	d, err := OpenForWrite(h.inst)
	must(t, err)
	for i := range uint16(10) {
		must(t, d.tables.maps[bpf.NATMapMappings].Put(uint32(i), bpf.NATMapping{Hold: 1}))
	}
	must(t, d.Close())
	opts := h.options(Auto)
	opts.Spec = small(1)
	h.attach(opts)
	if got := count(); got != 10 {
		t.Errorf("%d mappings after the upgrade, want 10", got)
	}
	devices := h.attach(opts).Devices
	if len(devices) != 2 || devices[0].Class != state.Bridge {
		t.Errorf("devices after the upgrade: %+v", devices)
	}
}
