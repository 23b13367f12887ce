package e2e

import (
	"context"
	"errors"
	"net/netip"
	"testing"
	"time"

	"tcnat/internal/lab"
)

// call is one exchange of data between two nodes.
type call struct {
	protocol string // tcp or udp
	client   *lab.Node
	server   *lab.Node
	listen   netip.AddrPort // where the server is
	to       netip.AddrPort // what the client calls, the same where nothing is published
}

// protocols are those of call.
func protocols() []string { return []string{"tcp", "udp"} }

// do makes the call. It returns the client's own address and the one that the server saw.
func (c call) do(ctx context.Context) (local, seen netip.AddrPort, err error) {
	var echo *lab.Echo
	if c.protocol == "tcp" {
		echo, err = lab.StartTCPEcho(ctx, c.server, c.listen)
	} else {
		echo, err = lab.StartUDPEcho(c.server, c.listen)
	}
	if err != nil {
		return local, seen, err
	}
	defer echo.Close()
	to := c.to
	if !to.IsValid() {
		to = echo.Addr
	}
	message := []byte("hello over " + c.protocol)
	if c.protocol == "tcp" {
		local, err = lab.ExchangeTCP(ctx, c.client, to, message)
	} else {
		local, err = lab.ExchangeUDP(ctx, c.client, netip.AddrPort{}, to, message)
	}
	if peers := echo.Peers(); len(peers) > 0 {
		seen = peers[0]
	}
	return local, seen, err
}

// mustSee makes the call and checks which address the server saw: want's, and its port
// where it has one.
func (c call) mustSee(t *testing.T, want netip.Addr) {
	t.Helper()
	local, seen, err := c.do(t.Context())
	if err != nil {
		t.Errorf("%s from %s to %s: %v", c.protocol, c.client.Role, c.to, err)
		return
	}
	if seen.Addr() != want {
		t.Errorf("%s: client %s was seen as %s, want %s", c.protocol, local, seen, want)
	}
}

// mustFail makes the call and checks that no answer comes.
func (c call) mustFail(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), slowly(300*time.Millisecond))
	defer cancel()
	local, seen, err := c.do(ctx)
	if !errors.Is(err, lab.ErrNoReply) || seen.IsValid() {
		t.Errorf("%s from %s (%s) to %s: server saw %s, error %v, want %v",
			c.protocol, c.client.Role, local, c.to, seen, err, lab.ErrNoReply)
	}
}

// mustPing sends an echo request and wants its reply from the address that was asked.
func mustPing(t *testing.T, from *lab.Node, to netip.Addr, o lab.PingOptions) {
	t.Helper()
	reply, err := lab.Ping(t.Context(), from, to, o)
	if err != nil {
		t.Error(err)
		return
	}
	if reply.From != to {
		t.Errorf("ping %s from %s: %s answered", to, from.Role, reply.From)
	}
}

// mustNotPing sends an echo request and wants no answer of any kind.
func mustNotPing(t *testing.T, from *lab.Node, to netip.Addr, o lab.PingOptions) {
	t.Helper()
	o.Timeout = slowly(300 * time.Millisecond)
	if _, err := lab.Ping(t.Context(), from, to, o); !errors.Is(err, lab.ErrNoReply) {
		t.Errorf("ping %s from %s: %v, want %v", to, from.Role, err, lab.ErrNoReply)
	}
}
