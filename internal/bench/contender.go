package bench

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
)

// Names of the contenders.
const (
	plain            = "plain"
	floor            = "floor"
	iptables         = "iptables"
	nftables         = "nft"
	dockerProxy      = "docker-proxy"
	redirect         = "redirect"
	redirectNeigh    = "redirect-neigh"
	tcnatOff         = "tcnat-off"
	tcnatLeased      = "tcnat-established"
	tcnatAlways      = "tcnat-always"
	tcnatNoPorts     = "tcnat-noports"
	tcnatLeasedPre   = "tcnat-established-preallocated"
	tcnatAlwaysPre   = "tcnat-always-preallocated"
	measuredMaxFlows = 1 << 20 // room in tcnat's tables in a full run
)

// implementation is a way to get packets between containers and the world.
type implementation struct {
	name, about string
	nat         bool // the world sees the host's address alone
	stateless   bool // knows no flows
	floor       bool // packets are counted where they enter the host: what the rig costs
	// install puts it into a rig. What it returns is undone before the rig goes.
	install func(ctx context.Context, r *rig, o installOptions) (installed, error)
}

// installOptions are what differs between the rigs of a run.
type installOptions struct {
	maxFlows uint32 // room in tcnat's tables; 0: its default
	binary   string // the tcnat command
}

// installed is an implementation at work.
type installed struct {
	pins   string                                                         // directory with its maps; empty: it has none
	flush  func(ctx context.Context) error                                // forget all flows; nil: there are none
	rules  func(ctx context.Context, p publishing) (time.Duration, error) // publish these ports instead of what is published; nil: cannot
	add    func(ctx context.Context, port uint16) error                   // publish one more, by the whole command
	remove func(ctx context.Context) error                                // nil: it goes with the rig
}

// contender is an implementation in a rig of its own.
type contender struct {
	implementation
	installed
	rig     *rig
	used    bool // it may know flows
	crowded bool // its flows may hold the ports that others are to have
}

// implementations lists all of them. tcnat comes last, so that others' changes of what the
// kernel has one of are made before.
func implementations() []implementation {
	return append([]implementation{
		{name: plain, about: "kernel forwarding, no NAT, a route back", stateless: true, install: installPlain},
		{name: floor, about: "frames end where they enter the host: the cost of the rig", stateless: true, floor: true, install: installPlain},
		{name: iptables, about: "iptables-nft MASQUERADE and DNAT, Docker's rules", nat: true, install: installIptables},
		{name: nftables, about: "nftables masquerade and a dnat map", nat: true, install: installNftables},
		{name: dockerProxy, about: "Docker's userland proxy", nat: true, install: installProxy},
		{name: redirect, about: "bare header and bpf_redirect (inward bpf_redirect_peer), no NAT: the ceiling", stateless: true, install: installRedirect},
		{name: redirectNeigh, about: "bare bpf_redirect_neigh, no NAT", stateless: true, install: installRedirectNeigh},
	}, tcnatImplementations()...)
}

func implementationOf(name string) (implementation, error) {
	all := implementations()
	at := slices.IndexFunc(all, func(i implementation) bool { return i.name == name })
	if at < 0 {
		return implementation{}, fmt.Errorf("contender %s: no such", name)
	}
	return all[at], nil
}

// newContender builds a rig and installs an implementation in it. before, if any, prepares the
// rig first.
func newContender(ctx context.Context, name string, ro rigOptions, io installOptions, before func(context.Context, *rig) error) (*contender, error) {
	impl, err := implementationOf(name)
	if err != nil {
		return nil, err
	}
	c := &contender{implementation: impl}
	if c.rig, err = newRig(ctx, ro); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if before != nil {
		err = before(ctx, c.rig)
	}
	if err == nil {
		c.installed, err = impl.install(ctx, c.rig, io)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", name, err), c.close(ctx))
	}
	return c, nil
}

// flush forgets all flows.
func (c *contender) flush(ctx context.Context) error {
	if c.installed.flush == nil || !c.used {
		return nil
	}
	if err := c.installed.flush(ctx); err != nil {
		return fmt.Errorf("forget flows: %w", err)
	}
	c.used, c.crowded = false, false
	return nil
}

// close removes implementation and rig, also when the context has ended.
func (c *contender) close(ctx context.Context) error {
	var err error
	if c.remove != nil {
		err = c.remove(context.WithoutCancel(ctx))
	}
	return errors.Join(err, c.rig.close())
}

func installPlain(_ context.Context, r *rig, _ installOptions) (installed, error) {
	return installed{}, r.routeBack()
}
