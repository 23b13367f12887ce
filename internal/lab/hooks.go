package lab

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Attached lists what is attached to a device's TC hooks, a line each: the TCX programs,
// and the qdiscs besides the one that the device was made with. Empty: nothing is.
func (n *Node) Attached(device string) ([]string, error) {
	dev, err := n.link.LinkByName(device)
	if err != nil {
		return nil, fmt.Errorf("%s: %s: %w", n.Role, device, err)
	}
	index := dev.Attrs().Index
	var found []string
	for _, hook := range []struct {
		name string
		at   ebpf.AttachType
	}{
		{"ingress", ebpf.AttachTCXIngress},
		{"egress", ebpf.AttachTCXEgress},
	} {
		var programs *link.QueryResult
		err := n.Do(func() (err error) {
			programs, err = link.QueryPrograms(link.QueryOptions{Target: index, Attach: hook.at})
			return err
		})
		if errors.Is(err, unix.EINVAL) || errors.Is(err, link.ErrNotSupported) {
			continue // a kernel without TCX has nothing there
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %s %s: %w", n.Role, device, hook.name, permission(err))
		}
		for _, program := range programs.Programs {
			found = append(found, fmt.Sprintf("%s %s: tcx program %d", device, hook.name, program.ID))
		}
	}
	qdiscs, err := n.link.QdiscList(dev)
	if err != nil {
		return nil, fmt.Errorf("%s: qdiscs of %s: %w", n.Role, device, err)
	}
	for _, qdisc := range qdiscs {
		if kind := qdisc.Type(); kind == "clsact" || kind == "ingress" {
			found = append(found, fmt.Sprintf("%s: qdisc %s", device, kind))
		}
	}
	return found, nil
}
