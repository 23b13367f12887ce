package loader

import (
	"fmt"

	"github.com/cilium/ebpf"

	"tcnat/maps"
)

// DefaultMaxFlows is the bound of flows where AttachOptions names none.
const DefaultMaxFlows = 131072

// FlowLimit bounds AttachOptions.MaxFlows: it keeps the tables' sizes under what a map may have.
const FlowLimit = 1 << 26

// AttachMode says how programs get on a device.
type AttachMode uint8

const (
	// Auto is TCX, and clsact where the kernel has no TCX or somebody else has clsact filters
	// on the device: those would run after ours.
	Auto AttachMode = iota
	// TCX needs kernel 6.6.
	TCX
	// Clsact attaches direct-action filters, on every kernel.
	Clsact
)

// String is the word of the command line.
func (m AttachMode) String() string {
	switch m {
	case TCX:
		return "tcx"
	case Clsact:
		return "clsact"
	default:
		return "auto"
	}
}

// FastPath says who may pass by the host's stack.
type FastPath uint8

const (
	// FastPathAuto is FastPathEstablished, and FastPathOff where the host tracks connections.
	FastPathAuto FastPath = iota
	// FastPathEstablished is for flows of which the host lets a packet through now and then.
	FastPathEstablished
	// FastPathAlways is for first packets too: the routing table is asked, the firewall is not.
	FastPathAlways
	// FastPathOff leaves every packet to the host's stack.
	FastPathOff
)

// String is the word of the command line.
func (f FastPath) String() string {
	switch f {
	case FastPathEstablished:
		return "established"
	case FastPathAlways:
		return "always"
	case FastPathOff:
		return "off"
	default:
		return "auto"
	}
}

// DefaultMark is the bit of the packet mark that is used where AttachOptions name none.
const DefaultMark = 12

// AttachOptions say what to attach to, and how. Devices that are attached already and are not
// named stay attached; all else is as the options say, not as it was.
type AttachOptions struct {
	Bridges, Uplinks []string
	Mode             AttachMode
	NoMasquerade     bool           // make no SNAT rules for the bridges' subnets: containers are routed
	MaxFlows         uint32         // 0: as it is, DefaultMaxFlows at first
	Preallocate      bool           // the flows' memory is taken at once, not as they come; false: as it is
	AllowDirect      bool           // containers can be reached by their own address
	NoIsolation      bool           // the bridges reach each other
	PassUnmanaged    bool           // containers' traffic may leave by devices that are not named
	AnySender        bool           // endpoint-independent filtering: whoever sends to a container's outside UDP port reaches it
	Timeouts         *maps.Timeouts // nil: as they are, maps.DefaultTimeouts at first
	FastPath         FastPath
	Mark             *uint8 // bit 0 to 31 of the packet mark, on redirected packets for a moment; nil: DefaultMark
	NoPorts          bool   // put no program on the bridges' ports: the fast path begins at the bridge

	// Cgroup is where the host's own sockets reach published ports: a directory of cgroup v2, and
	// the processes below it, or CgroupAuto; "": nowhere.
	Cgroup string

	// Spec is the datapath; nil is bpf.LoadNAT. Tests pass other builds of it.
	Spec func() (*ebpf.CollectionSpec, error)
}

func (o AttachOptions) spec() (*ebpf.CollectionSpec, error) {
	load := o.Spec
	if load == nil {
		load = ownSpec
	}
	spec, err := load()
	if err != nil {
		return nil, fmt.Errorf("read datapath: %w", err)
	}
	return spec.Copy(), nil
}

func (o AttachOptions) validate() error {
	if o.MaxFlows > FlowLimit {
		return fmt.Errorf("max flows %d: at most %d", o.MaxFlows, FlowLimit)
	}
	if o.mark() > 31 {
		return fmt.Errorf("mark %d: the packet mark has bits 0 to 31", o.mark())
	}
	return nil
}

func (o AttachOptions) mark() uint8 {
	if o.Mark == nil {
		return DefaultMark
	}
	return *o.Mark
}

// config is what the options make of the configuration that is there (the zero value at first),
// with this fast path.
func (o AttachOptions) config(have maps.Config, fast maps.FastPath) maps.Config {
	have.FastPath, have.Mark = fast, 0
	if fast != maps.FastPathOff { // else no bit of the mark has a meaning
		have.Mark = 1 << o.mark()
	}
	if o.MaxFlows != 0 {
		have.MaxFlows = o.MaxFlows
	}
	if have.MaxFlows == 0 {
		have.MaxFlows = DefaultMaxFlows
	}
	if o.Timeouts != nil {
		have.Timeouts = *o.Timeouts
	}
	if have.Timeouts == (maps.Timeouts{}) {
		have.Timeouts = maps.DefaultTimeouts()
	}
	have.AllowDirect = o.AllowDirect
	have.NoIsolation = o.NoIsolation
	have.PassUnmanaged = o.PassUnmanaged
	have.AnySender = o.AnySender
	have.Routed = o.NoMasquerade
	return have
}
