package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"
	"time"
)

const (
	demoPort    = 3005
	demoServers = 7 // port of the servers in world
)

// DemoTool is the command line that Demo shows.
type DemoTool struct {
	// Run executes one command line, without the program's name, in this process, and
	// writes what it has to say to stdout.
	Run func(ctx context.Context, stdout io.Writer, args ...string) error
	// PinDir is where the pins of an instance are.
	PinDir func(instance string) string
}

// demo is one run of Demo.
type demo struct {
	w        io.Writer
	tool     DemoTool
	lab      *Lab
	instance string
	attached bool
	sysctls  map[string]string // of the host, before attach
}

// Demo builds a lab and performs in it what tcnat is for: a container that does not reach
// the world, attach, a container that does, published ports, detach, nothing left. Every
// step prints a line that begins with "ok" or "FAILED". The error, which wraps ErrFailed,
// is that of the first step that did not do what it says; nothing is left either way.
func Demo(ctx context.Context, w io.Writer, tool DemoTool) (err error) {
	l, err := New(ctx, Options{})
	if err != nil {
		return err
	}
	d := &demo{w: w, tool: tool, lab: l, instance: "demo-" + l.Name}
	defer func() {
		err = errors.Join(err, d.cleanUp(context.WithoutCancel(ctx)))
	}()
	fmt.Fprintf(w, "%s\n", d.picture())
	for _, act := range []struct {
		title string
		play  func(context.Context) error
	}{
		{"Without tcnat the world cannot answer the container", d.before},
		{"tcnat translates the container's address to the uplink's", d.outbound},
		{"Published ports: the world reaches the container", d.published},
		{"After detach nothing is left", d.after},
	} {
		fmt.Fprintf(w, "\n# %s\n", act.title)
		if err := act.play(ctx); err != nil {
			return fmt.Errorf("%w: %w", ErrFailed, err)
		}
	}
	return nil
}

// cleanUp detaches where a failure came in between, and removes the lab.
func (d *demo) cleanUp(ctx context.Context) error {
	var errs []error
	if d.attached {
		errs = append(errs, d.tool.Run(ctx, io.Discard, d.global("detach")...))
	}
	return errors.Join(append(errs, d.lab.Close())...)
}

func (d *demo) picture() string {
	c, h, w := d.lab.Containers[0], d.lab.Host, d.lab.World
	return fmt.Sprintf("container %s -- docker0 [host] eth0 %s -- router -- isp -- %s world %s\n(network namespaces %s, %s, %s, ...)",
		c.Addr(IPv4), h.Addr(IPv4), w.Addr(IPv4), w.Loopback(IPv4), c.Netns, h.Netns, w.Netns)
}

func (d *demo) before(ctx context.Context) (err error) {
	if d.sysctls, err = d.lab.Host.Sysctls(); err != nil {
		return err
	}
	for _, f := range Families() {
		if err := d.unanswered(ctx, f); err != nil {
			return err
		}
	}
	return nil
}

func (d *demo) outbound(ctx context.Context) error {
	d.attached = true // detach has to follow, whatever attach came to
	// The root of the cgroups is the machine's, not the lab's: nothing is attached there.
	_, err := d.command(ctx, "attach", "--bridge", Bridge, "--uplink", Uplink, "--cgroup", "none")
	if err != nil {
		return err
	}
	c, host, world := d.lab.Containers[0], d.lab.Host, d.lab.World
	for _, f := range Families() {
		server := netip.AddrPortFrom(world.Loopback(f), demoServers)
		if err := d.step(fmt.Sprintf("container pings %s", server.Addr()), func() (string, error) {
			reply, err := Ping(ctx, c, server.Addr(), PingOptions{})
			return fmt.Sprintf("answered in %s", reply.RTT.Round(time.Microsecond)), err
		}); err != nil {
			return err
		}
		if err := d.talk(ctx, c, world, server, server, host.Addr(f)); err != nil {
			return err
		}
	}
	return nil
}

func (d *demo) published(ctx context.Context) error {
	c, host, world := d.lab.Containers[0], d.lab.Host, d.lab.World
	for _, f := range Families() {
		inside := netip.AddrPortFrom(c.Addr(f), demoPort)
		for _, protocol := range []string{"tcp", "udp"} {
			if _, err := d.command(ctx, "dnat", "add", "-p", protocol, "--dport", fmt.Sprint(demoPort), "--to-destination", inside.String()); err != nil {
				return err
			}
		}
		// The server in the container sees the client's own address.
		if err := d.talk(ctx, world, c, inside, netip.AddrPortFrom(host.Addr(f), demoPort), world.Addr(f)); err != nil {
			return err
		}
	}
	flows, err := d.command(ctx, "flows", "list")
	if err != nil {
		return err
	}
	return d.step("the flow table shows both directions", func() (string, error) {
		for _, f := range Families() {
			for _, addr := range []netip.Addr{c.Addr(f), host.Addr(f), world.Addr(f), world.Loopback(f)} {
				if !strings.Contains(flows, addr.String()) {
					return "", fmt.Errorf("%s is not in it", addr)
				}
			}
		}
		return fmt.Sprintf("%d lines", strings.Count(flows, "\n")), nil
	})
}

func (d *demo) after(ctx context.Context) error {
	if _, err := d.command(ctx, "detach"); err != nil {
		return err
	}
	d.attached = false
	if err := d.step("no program, qdisc, pin or changed sysctl", func() (string, error) { return "", d.leftovers() }); err != nil {
		return err
	}
	if err := d.step("tcnat status finds nothing", func() (string, error) {
		if err := d.tool.Run(ctx, io.Discard, d.global("status")...); err == nil {
			return "", errors.New("status succeeded after detach")
		}
		return "", nil
	}); err != nil {
		return err
	}
	return d.unanswered(ctx, IPv4)
}

// unanswered shows a ping that leaves the host with the container's address.
func (d *demo) unanswered(ctx context.Context, f Family) error {
	c, to := d.lab.Containers[0], d.lab.World.Loopback(f)
	return d.step(fmt.Sprintf("container pings %s: no reply", to), func() (string, error) {
		capture, err := StartCapture(d.lab.World, "eth0", func(p Packet) bool { return p.Dst == to && !p.Outgoing })
		if err != nil {
			return "", err
		}
		_, err = Ping(ctx, c, to, PingOptions{Timeout: 500 * time.Millisecond})
		if closed := capture.Close(); closed != nil {
			return "", closed
		}
		if err == nil {
			return "", errors.New("there was one")
		}
		if !errors.Is(err, ErrNoReply) {
			return "", err
		}
		packets := capture.Packets()
		if len(packets) != 1 || packets[0].Src != c.Addr(f) {
			return "", fmt.Errorf("world saw %v, want one request from %s", packets, c.Addr(f))
		}
		return fmt.Sprintf("world got the request from %s, and has no route back", c.Addr(f)), nil
	})
}

// talk exchanges data by TCP and UDP between a client and a server in two nodes. The
// server listens at one address and is called by another, and has to see the client as
// seen.
func (d *demo) talk(ctx context.Context, client, serving *Node, listen, call netip.AddrPort, seen netip.Addr) error {
	for _, protocol := range []string{"tcp", "udp"} {
		title := fmt.Sprintf("%s from %s to %s", protocol, client.Role, call)
		if err := d.step(title, func() (string, error) {
			local, peer, err := exchangeOnce(ctx, protocol, client, serving, listen, call)
			if err != nil {
				return "", err
			}
			if peer.Addr() != seen {
				return "", fmt.Errorf("client is %s, server saw %s, want %s", local, peer, seen)
			}
			return fmt.Sprintf("client is %s, server sees %s", local, peer), nil
		}); err != nil {
			return err
		}
	}
	return nil
}

// exchangeOnce starts an echo server, calls it, and returns the client's own address and
// the one that the server saw.
func exchangeOnce(ctx context.Context, protocol string, client, serving *Node, listen, call netip.AddrPort) (local, peer netip.AddrPort, err error) {
	var echo *Echo
	if protocol == "tcp" {
		echo, err = StartTCPEcho(ctx, serving, listen)
	} else {
		echo, err = StartUDPEcho(serving, listen)
	}
	if err != nil {
		return local, peer, err
	}
	defer echo.Close()
	message := []byte("hello over " + protocol)
	if protocol == "tcp" {
		local, err = ExchangeTCP(ctx, client, call, message)
	} else {
		local, err = ExchangeUDP(ctx, client, netip.AddrPort{}, call, message)
	}
	if err != nil {
		return local, peer, err
	}
	peers := echo.Peers()
	if len(peers) != 1 {
		return local, peer, fmt.Errorf("server saw %d clients: %v", len(peers), peers)
	}
	return local, peers[0], nil
}

func (d *demo) leftovers() error {
	var found []string
	for _, device := range []string{Bridge, Uplink} {
		attached, err := d.lab.Host.Attached(device)
		if err != nil {
			return err
		}
		found = append(found, attached...)
	}
	if dir := d.tool.PinDir(d.instance); fileExists(dir) {
		found = append(found, "pins in "+dir)
	}
	now, err := d.lab.Host.Sysctls()
	if err != nil {
		return err
	}
	for key, value := range now {
		if was, ok := d.sysctls[key]; ok && was != value {
			found = append(found, fmt.Sprintf("sysctl %s: was %s, is %s", key, was, value))
		}
	}
	if len(found) > 0 {
		return fmt.Errorf("still there: %s", strings.Join(found, "; "))
	}
	return nil
}

// step prints what a check came to.
func (d *demo) step(title string, check func() (detail string, err error)) error {
	detail, err := check()
	if err != nil {
		fmt.Fprintf(d.w, "FAILED  %s: %v\n", title, err)
		return fmt.Errorf("%s: %w", title, err)
	}
	if detail != "" {
		title += ": " + detail
	}
	fmt.Fprintf(d.w, "ok      %s\n", title)
	return nil
}

// command shows a command line and its output, which it returns.
func (d *demo) command(ctx context.Context, args ...string) (string, error) {
	args = d.global(args...)
	fmt.Fprintf(d.w, "$ tcnat %s\n", strings.Join(args, " "))
	var out bytes.Buffer
	err := d.tool.Run(ctx, &out, args...)
	for line := range strings.Lines(out.String()) {
		fmt.Fprintf(d.w, "    %s", line)
	}
	return out.String(), d.step("tcnat "+strings.Join(args[len(d.global()):], " "), func() (string, error) { return "", err })
}

// global puts the global flags before a command's words.
func (d *demo) global(args ...string) []string {
	return append([]string{"--netns", d.lab.Host.Netns, "--instance", d.instance}, args...)
}

func fileExists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
