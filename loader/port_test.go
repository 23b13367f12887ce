package loader

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"tcnat/bpf"
	state "tcnat/maps"
)

// container makes a network namespace whose eth0 has the address, with the other end on the bridge.
func (h *host) container(port string, address state.MAC) {
	h.t.Helper()
	name := h.containerNetns(port)
	newNetns(h.t, name)
	target, err := netns.GetFromName(name)
	must(h.t, err)
	defer target.Close()
	must(h.t, h.nl.LinkAdd(&netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: port, MasterIndex: h.index("docker0")},
		PeerName:  "eth0", PeerNamespace: netlink.NsFd(int(target)),
		PeerHardwareAddr: net.HardwareAddr(address[:]),
	}))
	must(h.t, h.nl.LinkSetUp(h.link(port)))
}

// ports are the status of all ports, a line each: who is behind it, straight in or not, and why.
func portLines(status *Status) []string {
	var lines []string
	for _, p := range status.Ports {
		words := []string{p.Name}
		if p.Ingress.Program != "" {
			words = append(words, p.Attach.String(), p.Ingress.Program)
		}
		if p.MAC != (state.MAC{}) {
			words = append(words, p.MAC.String())
		}
		if p.Peer {
			words = append(words, "peer")
		}
		lines = append(lines, strings.Join(append(words, p.Slow, p.NoPeer), " "))
	}
	return lines
}

func (h *host) wantPorts(status *Status, want ...string) {
	h.t.Helper()
	got := portLines(status)
	for i := range got {
		got[i] = strings.TrimSpace(got[i])
	}
	if !slices.Equal(got, want) {
		h.t.Errorf("ports:\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// wantOwners compares what the datapath knows of who owns which address.
func (h *host) wantOwners(want map[state.MAC]string) {
	h.t.Helper()
	d, err := Open(h.inst)
	must(h.t, err)
	defer d.Close()
	ports, err := d.State().Ports()
	must(h.t, err)
	if len(ports) != len(want) {
		h.t.Errorf("owners %v, want %v", ports, want)
	}
	for address, name := range want {
		if got := ports[state.PortKey{Bridge: uint32(h.index("docker0")), MAC: address}]; int(got) != h.index(name) {
			h.t.Errorf("%s belongs to device %d, want %s", address, got, name)
		}
	}
}

var (
	mac1 = state.MAC{2, 0x42, 0xac, 0x11, 0, 2}
	mac2 = state.MAC{2, 0x42, 0xac, 0x11, 0, 3}
)

func TestPorts(t *testing.T) {
	for _, mode := range []AttachMode{TCX, Clsact} {
		t.Run(mode.String(), func(t *testing.T) {
			h := newHost(t)
			h.container("veth1", mac1)
			h.container("veth2", mac2)
			line := func(name string, address state.MAC) string {
				return fmt.Sprintf("%s %s from_port %s peer", name, mode, address)
			}
			status := h.attach(h.options(mode))
			h.wantPorts(status, line("veth1", mac1), line("veth2", mac2))
			h.wantOwners(map[state.MAC]string{mac1: "veth1", mac2: "veth2"})

			// Containers come and go, and that is no problem.
			must(t, h.nl.LinkDel(h.link("veth1")))
			h.container("veth3", mac1)
			now, err := h.status()
			must(t, err)
			if len(now.Problems) > 0 {
				t.Errorf("problems %q", now.Problems)
			}
			h.wantPorts(&now, line("veth2", mac2), "veth3 it has no program: run tcnat attach again")
			before := h.portPrograms()
			opts := h.options(mode)
			opts.Spec = small(9) // and an upgrade takes the ports along
			h.wantPorts(h.attach(opts), line("veth2", mac2), line("veth3", mac1))
			h.wantOwners(map[state.MAC]string{mac1: "veth3", mac2: "veth2"})
			if after := h.portPrograms(); slices.ContainsFunc(after, func(id ebpf.ProgramID) bool { return slices.Contains(before, id) }) {
				t.Errorf("programs on ports: %v before, %v after the upgrade", before, after)
			}
			if devices := h.devices(); len(devices) != 4 {
				t.Errorf("devices %+v: want docker0, eth0 and two ports", devices)
			}

			// A port that has left the bridge is none.
			must(t, h.nl.LinkSetNoMaster(h.link("veth2")))
			h.wantPorts(h.attach(opts), line("veth3", mac1))
			h.wantOwners(map[state.MAC]string{mac1: "veth3"})
			opts.NoPorts = true
			h.wantPorts(h.attach(opts), "veth3 it has no program: run tcnat attach again")
			h.wantOwners(nil)
			// While a qdisc comes or goes the kernel drops what the device sends: it goes with detach.
			if got, want := h.hasClsact("veth3"), mode == Clsact; got != want {
				t.Errorf("veth3 without its program: has a clsact qdisc: %t, want %t", got, want)
			}
			h.attach(h.options(mode))
			h.detach()
			if h.hasClsact("veth3") {
				t.Error("veth3 has a clsact qdisc after detach")
			}
		})
	}
}

func (h *host) hasClsact(device string) bool {
	h.t.Helper()
	qdiscs, err := h.nl.QdiscList(h.link(device))
	must(h.t, err)
	return slices.ContainsFunc(qdiscs, func(q netlink.Qdisc) bool { return q.Type() == "clsact" })
}

func (h *host) devices() []state.Device {
	h.t.Helper()
	d, err := Open(h.inst)
	must(h.t, err)
	defer d.Close()
	devices, err := d.State().Devices()
	must(h.t, err)
	return devices
}

func (h *host) portPrograms() []ebpf.ProgramID {
	h.t.Helper()
	status, err := h.status()
	must(h.t, err)
	var ids []ebpf.ProgramID
	for _, p := range status.Ports {
		if p.Ingress.ID != 0 {
			ids = append(ids, ebpf.ProgramID(p.Ingress.ID))
		}
	}
	return ids
}

// foreignTCX puts somebody's program on a hook, on ingress behind ours.
func (h *host) foreignTCX(device string, at ebpf.AttachType, anchor link.Anchor) link.Link {
	h.t.Helper()
	needTCX(h.t)
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "foreign", Type: ebpf.SchedCLS, License: "Dual BSD/GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()},
	})
	must(h.t, err)
	defer program.Close()
	l, err := link.AttachTCX(link.TCXOptions{Interface: h.index(device), Program: program, Attach: at, Anchor: anchor})
	must(h.t, err)
	h.t.Cleanup(func() { l.Close() })
	return l
}

// TestPeer: packets go straight into a container only where nothing is passed by.
func TestPeer(t *testing.T) {
	reason := map[string]struct {
		change func(h *host)
		want   string
	}{
		"tbf": {func(h *host) {
			must(h.t, h.nl.QdiscAdd(&netlink.Tbf{
				QdiscAttrs: netlink.QdiscAttrs{LinkIndex: h.index("veth1"), Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT},
				Rate:       1 << 20, Limit: 1 << 16, Buffer: 1 << 14,
			}))
		}, "veth1 from_port " + mac1.String() + "  its egress has the qdisc tbf"},
		"htb": {func(h *host) {
			must(h.t, h.nl.QdiscAdd(netlink.NewHtb(netlink.QdiscAttrs{
				LinkIndex: h.index("veth1"), Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT,
			})))
		}, "veth1 from_port " + mac1.String() + "  its egress has the qdisc htb"},
		"foreign egress": {func(h *host) {
			h.foreignTCX("veth1", ebpf.AttachTCXEgress, nil)
		}, "veth1 from_port " + mac1.String() + "  its egress has tcx foreign"},
		"xdp in the container": {func(h *host) {
			h.xdp("veth1")
		}, "veth1 from_port " + mac1.String() + "  an XDP program runs on its other end"},
		"isolated": {func(h *host) {
			must(h.t, h.nl.LinkSetIsolated(h.link("veth1"), true))
		}, "veth1 from_port " + mac1.String() + " it is an isolated port"},
		"no learning": {func(h *host) {
			must(h.t, h.nl.LinkSetLearning(h.link("veth1"), false))
		}, "veth1 from_port " + mac1.String() + " its bridge does not learn from it"},
		"peer here": {func(h *host) {
			must(h.t, h.nl.LinkDel(h.link("veth1")))
			must(h.t, h.nl.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "veth1", MasterIndex: h.index("docker0")}, PeerName: "veth1p"}))
		}, "veth1 from_port  its other end is in this network namespace"},
		"learned": {func(h *host) {
			must(h.t, h.nl.LinkDel(h.link("veth1")))
			must(h.t, h.nl.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "veth1", MasterIndex: h.index("docker0")}, PeerName: "veth1p", PeerHardwareAddr: mac2[:]}))
			must(h.t, h.nl.LinkSetUp(h.link("veth1p")))
			must(h.t, h.nl.LinkSetUp(h.link("veth1")))
			h.learn("veth1", mac2)
		}, "veth1 from_port " + mac2.String() + "  its other end is in this network namespace"},
		"learned two": {func(h *host) {
			must(h.t, h.nl.LinkDel(h.link("veth1")))
			must(h.t, h.nl.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "veth1", MasterIndex: h.index("docker0")}, PeerName: "veth1p"}))
			must(h.t, h.nl.LinkSetUp(h.link("veth1p")))
			must(h.t, h.nl.LinkSetUp(h.link("veth1")))
			h.learn("veth1", mac1)
			h.learn("veth1", mac2)
		}, "veth1 from_port  its other end is in this network namespace"},
	}
	for name, c := range reason {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			h.container("veth1", mac1)
			c.change(h)
			status := h.attach(h.options(Auto))
			h.wantPorts(status, strings.Replace(c.want, "veth1", "veth1 "+automatic(t).String(), 1))
			slow := status.Ports[0].Slow != ""
			for _, d := range h.devices() {
				if d.Class == state.Port && (d.Peer || d.Slow != slow) {
					t.Errorf("the datapath is told %+v", d)
				}
			}
			must(t, h.nl.LinkDel(h.link("veth1")))
			h.detach()
		})
	}
}

// containerNetns is the name of the network namespace behind a port.
func (h *host) containerNetns(port string) string {
	return h.netns[max(0, len(h.netns)-20):] + "-" + port
}

// xdp puts an XDP program on a container's own device.
func (h *host) xdp(port string) {
	h.t.Helper()
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.XDP, License: "Dual BSD/GPL", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 2), asm.Return()},
	})
	must(h.t, err)
	defer program.Close()
	must(h.t, InNetns(h.containerNetns(port), func() error {
		index, err := Ifindex("eth0")
		if err != nil {
			return err
		}
		l, err := link.AttachXDP(link.XDPOptions{Program: program, Interface: int(index), Flags: link.XDPGenericMode})
		if err == nil {
			h.t.Cleanup(func() { l.Close() })
		}
		return err
	}))
}

// learn puts an address into the bridge's own table, as a frame would, once the port forwards.
func (h *host) learn(port string, address state.MAC) {
	h.t.Helper()
	var err error
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		err = h.nl.NeighSet(&netlink.Neigh{
			LinkIndex: h.index(port), Family: unix.AF_BRIDGE, Flags: netlink.NTF_MASTER,
			State: netlink.NUD_REACHABLE, HardwareAddr: address[:],
		})
		if err == nil {
			return
		}
	}
	h.t.Fatal(err)
}

// Reasons that this machine's kernel may not be able to show.
func TestDescribe(t *testing.T) {
	for _, c := range []struct {
		link         rtLink
		filtering    bool
		slow, noPeer string
	}{
		{rtLink{kind: "tun", peerNetns: -1}, false, "", "it is no veth"},
		{rtLink{kind: "tun", peerNetns: -1}, true, "its bridge filters by VLAN", "it is no veth"},
		{rtLink{kind: "tun", peerNetns: -1, locked: true}, false, "it is a locked port", "it is no veth"},
		{rtLink{kind: "veth", peerNetns: -1}, false, "", "its other end is in this network namespace"},
	} {
		var p port
		p.describe(c.link, c.filtering)
		if p.slow != c.slow || p.noPeer != c.noPeer || p.trusted {
			t.Errorf("%+v: slow %q, no peer %q", c.link, p.slow, p.noPeer)
		}
	}
}

// TestPeerChanges: what comes after attach is told, and taken up by the next one.
func TestPeerChanges(t *testing.T) {
	h := newHost(t)
	h.container("veth1", mac1)
	h.attach(h.options(Auto))
	l := h.foreignTCX("veth1", ebpf.AttachTCXEgress, nil)
	status, err := h.status()
	must(t, err)
	if len(status.Problems) != 1 || !strings.Contains(status.Problems[0], "tcx foreign") {
		t.Errorf("problems %q, want one about the foreign program", status.Problems)
	}
	h.wantPorts(h.attach(h.options(Auto)), "veth1 tcx from_port "+mac1.String()+"  its egress has tcx foreign")
	must(t, l.Close())
	now := h.attach(h.options(Auto))
	h.wantPorts(now, "veth1 tcx from_port "+mac1.String()+" peer")
	h.detach()
}

// TestForgedAddress: who takes a neighbour's address gets nothing by it.
func TestForgedAddress(t *testing.T) {
	h := newHost(t)
	h.container("veth1", mac1)
	h.attach(h.options(Auto))
	h.container("veth2", mac1)
	h.attach(h.options(Auto))
	h.wantOwners(map[state.MAC]string{mac1: "veth1"}) // the first one keeps it
	h.detach()
	status := h.attach(h.options(Auto))
	h.wantOwners(nil) // nobody knows whose it is
	for _, p := range status.Ports {
		if p.Peer || !strings.Contains(p.NoPeer, "is another's too") {
			t.Errorf("port %+v", p)
		}
	}
	h.detach()
}

// TestSlowDevices: a device has no fast path where others are on its hooks that it would pass by.
func TestSlowDevices(t *testing.T) {
	for name, c := range map[string]struct {
		device  string
		ingress bool
		anchor  link.Anchor
		slow    bool
	}{
		"bridge ingress before ours": {"docker0", true, link.Head(), true},
		"bridge egress after ours":   {"docker0", false, link.Tail(), true},
		"uplink ingress before ours": {"eth0", true, link.Head(), false},
		"uplink ingress after ours":  {"eth0", true, link.Tail(), true},
		"uplink egress before ours":  {"eth0", false, link.Head(), true},
		"uplink egress after ours":   {"eth0", false, link.Tail(), false},
		"port ingress before ours":   {"veth1", true, link.Head(), false},
		"port ingress after ours":    {"veth1", true, link.Tail(), true},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			h.container("veth1", mac1)
			h.attach(h.options(Auto))
			at := ebpf.AttachTCXEgress
			if c.ingress {
				at = ebpf.AttachTCXIngress
			}
			l := h.foreignTCX(c.device, at, c.anchor)
			status, err := h.status()
			must(t, err)
			if got := len(status.Problems); (got == 1) != c.slow {
				t.Errorf("problems %q, slow %v", status.Problems, c.slow)
			}
			for _, present := range []bool{true, false} {
				if !present {
					must(t, l.Close())
				}
				status := h.attach(h.options(Auto))
				told := slices.ContainsFunc(status.Devices, func(d DeviceStatus) bool { return d.Name == c.device && d.Slow != "" }) ||
					slices.ContainsFunc(status.Ports, func(p PortStatus) bool { return p.Name == c.device && p.Slow != "" })
				slow := slices.ContainsFunc(h.devices(), func(d state.Device) bool { return int(d.Ifindex) == h.index(c.device) && d.Slow })
				if want := c.slow && present; told != want || slow != want {
					t.Errorf("foreign program there %v: slow %v, told %v, want %v", present, slow, told, want)
				}
			}
			h.detach()
		})
	}
}

// TestManyPorts: a hundred ports in one go do not wait for RCU one after the other.
func TestManyPorts(t *testing.T) {
	h := newHost(t)
	for i := range manyPorts {
		h.container(fmt.Sprintf("veth%d", i), state.MAC{2, 0, 0, 0, 1, byte(i)})
	}
	status := h.attach(h.options(Auto))
	for _, p := range status.Ports {
		if p.Attach != state.AttachClsact || !p.Peer {
			t.Errorf("port %+v", p)
		}
	}
	if status.Devices[0].Attach != automatic(t) {
		t.Errorf("bridge %+v", status.Devices[0])
	}
	h.detach()
}

// TestPortsByHand: load knows the ports and leaves them to the user.
func TestPortsByHand(t *testing.T) {
	h := newHost(t)
	h.container("veth1", mac1)
	commands, err := Load(context.Background(), h.inst, h.options(Auto))
	must(t, err)
	if !slices.ContainsFunc(commands, func(line string) bool {
		return strings.Contains(line, "dev veth1 ingress") && strings.HasSuffix(line, "/"+bpf.NATProgFromPort)
	}) {
		t.Errorf("commands %q: none for the port", commands)
	}
	status, err := h.status()
	must(t, err)
	h.wantPorts(&status, "veth1 manual from_port "+mac1.String()+" peer it has no program: run the commands that tcnat load prints")
	h.wantPorts(h.attach(h.options(Auto)), "veth1 "+automatic(t).String()+" from_port "+mac1.String()+" peer")
	h.detach()
}

// TestPortsVanish: ports that come and go while attach runs never make it fail.
func TestPortsVanish(t *testing.T) {
	for _, mode := range []AttachMode{TCX, Clsact} {
		t.Run(mode.String(), func(t *testing.T) {
			h := newHost(t)
			h.container("veth1", mac1)
			nl, err := newNetlink() // a handle stays in its namespace
			must(t, err)
			defer nl.Close()
			bridge := h.index("docker0")
			stop, done := make(chan struct{}), make(chan error)
			go func() {
				var err error
				for i := 0; err == nil; i++ {
					select {
					case <-stop:
						done <- nil
						return
					default:
					}
					name := fmt.Sprintf("brief%d", i%3)
					link := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name, MasterIndex: bridge}, PeerName: "p" + name}
					if old, missing := nl.LinkByName(name); missing == nil {
						err = nl.LinkDel(old)
					}
					if err == nil {
						err = nl.LinkAdd(link)
					}
				}
				<-stop
				done <- err
			}()
			for version := range int32(20) {
				opts := h.options(mode)
				opts.Spec = small(version)
				if _, err := Attach(context.Background(), h.inst, opts, nil); err != nil {
					t.Errorf("attach %d: %v", version, err)
				}
			}
			close(stop)
			must(t, <-done)
			status := h.attach(h.options(mode))
			if len(status.Ports) == 0 || status.Ports[len(status.Ports)-1].Name != "veth1" || !status.Ports[len(status.Ports)-1].Peer {
				t.Errorf("ports %q", portLines(status))
			}
			h.detach()
		})
	}
}
