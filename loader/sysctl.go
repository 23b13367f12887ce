package loader

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// readSysctl reads a setting of the current network namespace, named by its path, such as
// net/ipv4/ip_forward.
func readSysctl(path string) (string, error) {
	text, err := os.ReadFile(filepath.Join("/proc/sys", path))
	return strings.TrimSpace(string(text)), err
}

func writeSysctl(path, value string) error {
	if err := os.WriteFile(filepath.Join("/proc/sys", path), []byte(value), 0); err != nil {
		return fmt.Errorf("set %s=%s: %w", dotted(path), value, known(err))
	}
	return nil
}

func dotted(path string) string { return strings.ReplaceAll(path, "/", ".") }

// A setting is one that conntrack needs to bear with flows of which it sees a packet a second.
type setting struct {
	path   string
	want   string
	enough func(have string) bool
}

// conntrackSettings: a segment outside of the window that conntrack last saw is no fault, and
// one whose acknowledgement it did not see does not shorten a connection's life.
func conntrackSettings() []setting {
	const tcp = "net/netfilter/nf_conntrack_tcp_"
	established, err := readSysctl(tcp + "timeout_established")
	if err != nil {
		return nil
	}
	life, err := strconv.ParseUint(established, 10, 32)
	if err != nil {
		return nil
	}
	return []setting{
		{tcp + "be_liberal", "1", func(have string) bool { return have != "0" }},
		{tcp + "timeout_unacknowledged", established, func(have string) bool {
			seconds, err := strconv.ParseUint(have, 10, 32)
			return err == nil && seconds >= life
		}},
	}
}

// changes are the sysctls that an instance has changed. They are noted in a file before the
// first is changed, so that whatever is killed they can be taken back.
type changes struct {
	NetnsCookie uint64   `json:"netns_cookie"`
	Sysctls     []change `json:"sysctls"`
}

type change struct {
	Path string `json:"path"`
	Old  string `json:"old"`
	New  string `json:"new"`
}

func (i Instance) changesPath() string {
	i = i.withDefaults()
	return filepath.Join(i.RunDir, i.Name+".sysctl")
}

func readChanges(path string) (changes, error) {
	var c changes
	text, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return c, nil
	}
	if err != nil {
		return c, fmt.Errorf("read changed sysctls: %w", known(err))
	}
	if err := json.Unmarshal(text, &c); err != nil {
		// Written at once by a rename: it was not us.
		return changes{}, nil
	}
	return c, nil
}

func (i Instance) writeChanges(c changes) error {
	path := i.changesPath()
	if len(c.Sysctls) == 0 {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("forget changed sysctls: %w", known(err))
		}
		return nil
	}
	text, err := json.Marshal(c)
	if err == nil {
		err = os.WriteFile(path+"+new", append(text, '\n'), 0o600)
	}
	if err == nil {
		err = os.Rename(path+"+new", path)
	}
	if err != nil {
		return fmt.Errorf("note changed sysctls: %w", known(err))
	}
	return nil
}

// setSysctls makes conntrack bear the fast path. undo takes back what this call has changed.
func (a *attachment) setSysctls() (undo func() error, err error) {
	c, err := readChanges(a.inst.changesPath())
	if err != nil {
		return nil, err
	}
	if c.NetnsCookie != a.cookie {
		c = changes{NetnsCookie: a.cookie}
	}
	before := changes{c.NetnsCookie, slices.Clone(c.Sysctls)}
	var todo []change
	for _, s := range conntrackSettings() {
		have, err := readSysctl(s.path)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", dotted(s.path), known(err))
		}
		at := slices.IndexFunc(c.Sysctls, func(old change) bool { return old.Path == s.path })
		if s.enough(have) {
			if old, ok := a.inst.changedByOthers(a.cookie, s.path); ok && at < 0 && have == old.New {
				c.Sysctls = append(c.Sysctls, old) // whoever goes last restores it
			}
			continue
		}
		next := change{s.path, have, s.want}
		if at >= 0 {
			if have == c.Sysctls[at].New { // what we set is too little by now
				next.Old = c.Sysctls[at].Old
			}
			c.Sysctls[at] = next
		} else {
			c.Sysctls = append(c.Sysctls, next)
		}
		todo = append(todo, change{s.path, have, s.want})
	}
	if err := a.inst.writeChanges(c); err != nil {
		return nil, err
	}
	undo = func() error {
		var errs []error
		for _, t := range todo {
			if have, err := readSysctl(t.Path); err == nil && have == t.New {
				errs = append(errs, writeSysctl(t.Path, t.Old))
			}
		}
		return errors.Join(append(errs, a.inst.writeChanges(before))...)
	}
	for _, t := range todo {
		if err := writeSysctl(t.Path, t.New); err != nil {
			return nil, errors.Join(err, undo())
		}
		a.log.Warn("changed a sysctl, for the fast path beside conntrack; detach restores it",
			"sysctl", dotted(t.Path), "from", t.Old, "to", t.New)
	}
	return undo, nil
}

// changedByOthers is the change of a sysctl that another instance of this namespace has noted.
func (i Instance) changedByOthers(cookie uint64, path string) (change, bool) {
	files, _ := filepath.Glob(filepath.Join(i.withDefaults().RunDir, "*.sysctl"))
	for _, file := range files {
		if file == i.changesPath() {
			continue
		}
		c, err := readChanges(file)
		if err != nil || c.NetnsCookie != cookie {
			continue
		}
		for _, old := range c.Sysctls {
			if old.Path == path {
				return old, true
			}
		}
	}
	return change{}, false
}

// restoreSysctls takes back what the instance has changed, unless somebody has changed it since
// or another instance needs it.
func (i Instance) restoreSysctls(cookie uint64) (found bool, err error) {
	c, err := readChanges(i.changesPath())
	if err != nil || len(c.Sysctls) == 0 {
		return false, err
	}
	if c.NetnsCookie != cookie && netnsExists(c.NetnsCookie) {
		return false, nil
	}
	if c.NetnsCookie == cookie {
		for _, old := range c.Sysctls {
			have, err := readSysctl(old.Path)
			if err != nil || have != old.New {
				continue
			}
			if _, needed := i.changedByOthers(cookie, old.Path); needed {
				continue
			}
			if err := writeSysctl(old.Path, old.Old); err != nil {
				return true, err
			}
		}
	}
	return true, i.writeChanges(changes{})
}
