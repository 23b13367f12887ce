package bench

import (
	"context"
	"fmt"
	"net"

	"tcnat/internal/lab"
)

// installRedirect puts bare redirects on the bridge's ports, and on the uplink one to the
// first container.
func installRedirect(_ context.Context, r *rig, _ installOptions) (installed, error) {
	if err := r.routeBack(); err != nil {
		return installed{}, err
	}
	uplink, err := r.Host.Ifindex(lab.Uplink)
	if err != nil {
		return installed{}, err
	}
	if err := redirectPorts(r, "redirect", uplink); err != nil {
		return installed{}, err
	}
	first := r.bridgePort(0)
	index, err := r.Host.Ifindex(first.device)
	if err != nil {
		return installed{}, err
	}
	inward := bareRedirect{target: index, dst: r.inside[0], src: r.bridge}
	return installed{}, inward.attach(r, "redirect_peer", place{r.Host, lab.Uplink})
}

// installRedirectNeigh puts the redirect that asks for the neighbour on the bridge's ports.
func installRedirectNeigh(_ context.Context, r *rig, _ installOptions) (installed, error) {
	if err := r.routeBack(); err != nil {
		return installed{}, err
	}
	uplink, err := r.Host.Ifindex(lab.Uplink)
	if err != nil {
		return installed{}, err
	}
	return installed{}, redirectPorts(r, "redirect_neigh", uplink)
}

func redirectPorts(r *rig, program string, uplink int) error {
	outward := bareRedirect{target: uplink, dst: r.world, src: r.uplink}
	for i := range r.Containers {
		if err := outward.attach(r, program, r.bridgePort(i)); err != nil {
			return err
		}
	}
	return nil
}

// bareRedirect writes both addresses of the Ethernet header and redirects to a device.
type bareRedirect struct {
	target   int
	dst, src net.HardwareAddr
}

func (b bareRedirect) attach(r *rig, program string, at place) error {
	spec, err := loadRig()
	if err != nil {
		return fmt.Errorf("%s: %w", program, err)
	}
	var head rigFrameHead
	copy(head.Dst[:], b.dst)
	copy(head.Src[:], b.src)
	for name, value := range map[string]any{"head": head, "target": uint32(b.target)} {
		if err := spec.Variables[name].Set(value); err != nil {
			return fmt.Errorf("%s: %s: %w", program, name, err)
		}
	}
	var objects rigPrograms
	if err := spec.LoadAndAssign(&objects, nil); err != nil {
		return fmt.Errorf("%s: load: %w", program, err)
	}
	defer objects.Close()
	switch program {
	case "redirect":
		return r.hold(attachIngress(at, objects.Redirect))
	case "redirect_peer":
		return r.hold(attachIngress(at, objects.RedirectPeer))
	default:
		return r.hold(attachIngress(at, objects.RedirectNeigh))
	}
}
