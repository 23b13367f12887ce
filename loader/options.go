package loader

import (
	"fmt"

	"github.com/cilium/ebpf"

	"tcnat/bpf"
	"tcnat/maps"
)

// DefaultMaxFlows is the bound of flows where AttachOptions names none.
const DefaultMaxFlows = 262144

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

// AttachOptions say what to attach to, and how. Devices that are attached already and are not
// named stay attached; all else is as the options say, not as it was.
type AttachOptions struct {
	Bridges, Uplinks []string
	Mode             AttachMode
	NoMasquerade     bool           // make no SNAT rules for the bridges' subnets: containers are routed
	MaxFlows         uint32         // 0: as it is, DefaultMaxFlows at first
	AllowDirect      bool           // containers can be reached by their own address
	NoIsolation      bool           // the bridges reach each other
	PassUnmanaged    bool           // containers' traffic may leave by devices that are not named
	Timeouts         *maps.Timeouts // nil: as they are, maps.DefaultTimeouts at first

	// Spec is the datapath; nil is bpf.LoadNAT. Tests pass other builds of it.
	Spec func() (*ebpf.CollectionSpec, error)
}

func (o AttachOptions) spec() (*ebpf.CollectionSpec, error) {
	load := o.Spec
	if load == nil {
		load = bpf.LoadNAT
	}
	spec, err := load()
	if err != nil {
		return nil, fmt.Errorf("read datapath: %w", err)
	}
	return spec, nil
}

func (o AttachOptions) validate() error {
	if o.MaxFlows > FlowLimit {
		return fmt.Errorf("max flows %d: at most %d", o.MaxFlows, FlowLimit)
	}
	return nil
}

// config is what the options make of the configuration that is there (the zero value at first).
func (o AttachOptions) config(have maps.Config) maps.Config {
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
	have.Routed = o.NoMasquerade
	return have
}
