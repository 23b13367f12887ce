package loader

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"tcnat/maps"
)

// FastPathStatus is the fast path in force, and why it is that one.
type FastPathStatus struct {
	Asked      FastPath // what attach was asked for
	Mode       maps.FastPath
	Reason     string
	Granted    uint64 // leases so far
	Redirected uint64 // packets so far
}

// decideFastPath says which one the options come to here. Netfilter's conntrack would see one
// packet a second of a flow, and forget or refuse it: auto gives way.
func (o AttachOptions) decideFastPath(tracked tracking) maps.FastPath {
	switch o.FastPath {
	case FastPathOff:
		return maps.FastPathOff
	case FastPathEstablished:
		return maps.FastPathEstablished
	case FastPathAlways:
		return maps.FastPathAlways
	}
	if tracked.active() {
		return maps.FastPathOff
	}
	return maps.FastPathEstablished
}

// reason says in words why the mode is in force. tracked is how things are now.
func (s FastPathStatus) reason(tracked tracking) string {
	const remedy = "tcnat attach --fast-path established switches it on, and sets two sysctls of conntrack for it"
	switch {
	case s.Asked == FastPathOff:
		return "switched off"
	case s.Mode == maps.FastPathOff && tracked.active():
		return fmt.Sprintf("connections are tracked, and conntrack would miss most packets: %s: %s", tracked.by, remedy)
	case s.Mode == maps.FastPathOff:
		return "connections were tracked when attach ran, and are no more: run tcnat attach again"
	case s.Asked != FastPathAuto && tracked.active():
		return "asked for; conntrack sees one packet a second of a flow, and is set to bear that"
	case s.Asked != FastPathAuto:
		return "asked for"
	default:
		return "no connections are tracked"
	}
}

// problem is what has changed since attach.
func (s FastPathStatus) problem(tracked tracking) string {
	if s.Mode == maps.FastPathOff || !tracked.active() || s.Asked == FastPathAuto && s.Mode == maps.FastPathOff {
		return ""
	}
	if s.Asked == FastPathAuto {
		return fmt.Sprintf("connections are tracked since attach ran, and conntrack misses most packets of the fast path: %s: run tcnat attach again", tracked.by)
	}
	for _, setting := range conntrackSettings() {
		if have, err := readSysctl(setting.path); err == nil && !setting.enough(have) {
			return fmt.Sprintf("connections are tracked, and %s is %s, so conntrack refuses flows of the fast path: run tcnat attach again",
				dotted(setting.path), have)
		}
	}
	return ""
}

// asked is where the option is kept, whose outcome alone is in the maps: as the name of an empty
// directory, since bpffs has no files.
func (p pins) asked() string { return filepath.Join(string(p), "fast-path") }

func askable() []FastPath {
	return []FastPath{FastPathAuto, FastPathEstablished, FastPathAlways, FastPathOff}
}

func (p pins) setAsked(fast FastPath) error {
	if err := os.MkdirAll(filepath.Join(p.asked(), fast.String()), 0o700); err != nil {
		return fmt.Errorf("note the fast path: %w", known(err))
	}
	for _, other := range askable() {
		if other == fast {
			continue
		}
		if err := os.Remove(filepath.Join(p.asked(), other.String())); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("note the fast path: %w", known(err))
		}
	}
	return nil
}

// readAsked takes what it cannot read for the default.
func (p pins) readAsked() FastPath {
	for _, fast := range askable() {
		if _, err := os.Lstat(filepath.Join(p.asked(), fast.String())); err == nil {
			return fast
		}
	}
	return FastPathAuto
}

// checkMark refuses a bit that the host's routing rules look at: a packet that is redirected
// would be routed otherwise. The error wraps ErrMarkUsed.
func (a *attachment) checkMark() error {
	bit := a.opts.mark()
	var used uint32
	text := ""
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		rules, err := a.nl.RuleList(family)
		if errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) {
			continue
		}
		if err != nil {
			return fmt.Errorf("list routing rules: %w", known(err))
		}
		for _, rule := range rules {
			if rule.Mask == nil {
				continue
			}
			used |= *rule.Mask
			if *rule.Mask&(1<<bit) != 0 && text == "" {
				text = fmt.Sprintf("fwmark %#x/%#x lookup %d (priority %d)", rule.Mark, *rule.Mask, rule.Table, rule.Priority)
			}
		}
	}
	if text == "" {
		return nil
	}
	for i := range uint8(32) {
		// from the default on, round
		if other := (DefaultMark + i) % 32; used&(1<<other) == 0 {
			return fmt.Errorf("mark %d: %w: the routing rule %s looks at it: use --mark %d", bit, ErrMarkUsed, text, other)
		}
	}
	return fmt.Errorf("mark %d: %w: the routing rule %s looks at it, and no bit is left: use --fast-path off", bit, ErrMarkUsed, text)
}
