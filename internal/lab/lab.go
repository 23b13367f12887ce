package lab

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"
)

const (
	// netnsPrefix begins the name of every namespace of every lab.
	netnsPrefix = "tcnat-"
	// settleTime bounds the wait for links and neighbours of a new lab, on a machine that is busy.
	settleTime = 20 * time.Second
	// maxContainers keeps the containers' addresses within one byte.
	maxContainers = 200
)

var (
	validName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,22}[a-z0-9])?$`)
	validRole = regexp.MustCompile(`^(host|router|isp|world|other|far|c[1-9][0-9]{0,2})$`)
)

// Options choose what a lab has. The zero value is one container, its host and the
// outside, all MTUs 1500, offloads on.
type Options struct {
	// Name is part of the namespaces' names; empty: one that is unique.
	Name string
	// Containers is how many are on the bridge; 0: 1.
	Containers int
	// SecondUplink adds the device eth1 to the host and the node Other behind it.
	SecondUplink bool
	// TunUplink adds the device tun0, which has no Ethernet header, and the node Far
	// behind it. Packets are carried by this process, until Close.
	TunUplink bool
	// NearWorld puts World where Router is: at the other end of eth0, which saves the
	// cost of two routers where speed is measured.
	NearWorld bool
	// HopMTU is the MTU between router and isp; 0: 1500.
	HopMTU int
	// NoSegmentation switches TSO, GSO and GRO off on every device.
	NoSegmentation bool
	// BridgeNetfilter sets bridge-nf-call-iptables and -ip6tables to 1, not 0.
	BridgeNetfilter bool
	// HostSysctls are set in the host's namespace last, by key below /proc/sys.
	HostSysctls map[string]string
}

// Lab is a set of namespaces that stands until Close.
type Lab struct {
	Name       string
	Containers []*Node
	Host       *Node
	Router     *Node // nil with Options.NearWorld
	ISP        *Node // nil with Options.NearWorld
	World      *Node
	Other      *Node // behind eth1; nil without Options.SecondUplink
	Far        *Node // behind tun0; nil without Options.TunUplink

	nodes  []*Node
	tunnel *tunnel
}

// New builds a lab and waits until its neighbours reach each other. After an error
// nothing is left of it.
func New(ctx context.Context, options Options) (_ *Lab, err error) {
	if options.Name == "" {
		options.Name = uniqueName()
	}
	if options.Containers == 0 {
		options.Containers = 1
	}
	if err := options.validate(); err != nil {
		return nil, fmt.Errorf("lab: %w", err)
	}
	l := &Lab{Name: options.Name}
	built := false
	defer func() {
		if !built { // also on the way of a panic
			err = errors.Join(err, l.Close())
		}
	}()
	if err := l.build(ctx, options); err != nil {
		return nil, fmt.Errorf("lab %s: %w", l.Name, err)
	}
	if err := l.settle(ctx); err != nil {
		return nil, fmt.Errorf("lab %s: %w", l.Name, err)
	}
	built = true
	return l, nil
}

func (o Options) validate() error {
	switch {
	case !validName.MatchString(o.Name):
		return fmt.Errorf("%w: name %q: use 1 to 24 of a-z, 0-9 and -", ErrBadOptions, o.Name)
	case o.Containers < 0 || o.Containers > maxContainers:
		return fmt.Errorf("%w: %d containers: at most %d", ErrBadOptions, o.Containers, maxContainers)
	case o.HopMTU != 0 && (o.HopMTU < 1280 || o.HopMTU > 1500):
		return fmt.Errorf("%w: hop MTU %d: use 1280 to 1500", ErrBadOptions, o.HopMTU)
	}
	return nil
}

// Nodes returns every node of the lab.
func (l *Lab) Nodes() []*Node { return slices.Clone(l.nodes) }

// Close removes the lab. It goes on after an error, and may be called again.
func (l *Lab) Close() error {
	var errs []error
	if l.tunnel != nil {
		l.tunnel.close()
		l.tunnel = nil
	}
	for _, n := range l.nodes {
		if err := n.remove(); err != nil {
			errs = append(errs, err)
		}
	}
	l.nodes = nil
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("lab %s: %w", l.Name, err)
	}
	return nil
}

// Release closes what the lab holds open and leaves its namespaces standing, for Down.
func (l *Lab) Release() error {
	if l.tunnel != nil {
		return fmt.Errorf("lab %s: %w", l.Name, ErrNeedsProcess)
	}
	for _, n := range l.nodes {
		n.release()
	}
	l.nodes = nil
	return nil
}

// Down removes the lab of a name that another process built and released.
func Down(name string) error {
	nodes, err := standing(name)
	if err != nil {
		return fmt.Errorf("lab %s: %w", name, err)
	}
	if len(nodes) == 0 {
		return fmt.Errorf("lab %s: %w", name, ErrNotFound)
	}
	l := &Lab{Name: name, nodes: nodes}
	return l.Close()
}

// standing opens the namespaces of the lab of that name.
func standing(name string) ([]*Node, error) {
	if !validName.MatchString(name) {
		return nil, fmt.Errorf("%w: name %q", ErrBadOptions, name)
	}
	entries, err := os.ReadDir(netnsDir)
	if err != nil && !os.IsNotExist(err) {
		return nil, err
	}
	var nodes []*Node
	for _, entry := range entries {
		role, ours := strings.CutPrefix(entry.Name(), netnsPrefix+name+"-")
		if ours && validRole.MatchString(role) {
			nodes = append(nodes, openNode(entry.Name(), role))
		}
	}
	return nodes, nil
}

func (l *Lab) add(role string) (*Node, error) {
	n, err := newNode(netnsPrefix+l.Name+"-", role)
	if err != nil {
		return nil, err
	}
	l.nodes = append(l.nodes, n)
	return n, nil
}

// settle waits until every neighbour has answered: links are up, addresses are known.
func (l *Lab) settle(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, settleTime)
	defer cancel()
	type pair struct {
		from *Node
		to   netip.Addr
	}
	var pairs []pair
	for _, f := range Families() {
		for _, c := range l.Containers {
			pairs = append(pairs, pair{c, bridgeNet.address(f, 1)})
		}
		if l.Router != nil {
			pairs = append(pairs, pair{l.Host, l.Router.Addr(f)})
		}
		pairs = append(pairs, pair{l.Host, l.World.Addr(f)}, pair{l.Host, l.World.Loopback(f)})
		if l.Other != nil {
			pairs = append(pairs, pair{l.Host, l.Other.Loopback(f)})
		}
		if l.Far != nil {
			pairs = append(pairs, pair{l.Host, l.Far.Loopback(f)})
		}
	}
	for _, p := range pairs {
		for {
			_, err := Ping(ctx, p.from, p.to, PingOptions{Timeout: 100 * time.Millisecond})
			if err == nil {
				break
			}
			if ctx.Err() != nil {
				return fmt.Errorf("%s does not reach %s: %w", p.from.Role, p.to, err)
			}
		}
	}
	return nil
}

func uniqueName() string {
	var b [4]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}
