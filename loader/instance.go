package loader

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
)

// ABIVersion is ABI_VERSION of bpf/abi.h: pins of another one are not touched.
const ABIVersion = 3

const (
	defaultName   = "default"
	defaultBPFFS  = "/sys/fs/bpf"
	defaultRunDir = "/run/tcnat"
)

// Instance names one datapath. The zero value is the instance "default".
type Instance struct {
	Name   string // [a-z0-9_-]{1,32}; "" is "default"
	BPFFS  string // directory on a BPF file system; "" is /sys/fs/bpf
	RunDir string // where the lock is; "" is /run/tcnat
}

// '+' and '.' stay outside: the first marks what is staged, the second bpffs refuses.
var validName = regexp.MustCompile(`^[a-z0-9_-]{1,32}$`)

// Validate checks the name; the error wraps ErrBadInstance.
func (i Instance) Validate() error {
	if name := i.withDefaults().Name; !validName.MatchString(name) {
		return fmt.Errorf("instance %q: %w: use 1 to 32 of a-z, 0-9, _ and -", name, ErrBadInstance)
	}
	return nil
}

func (i Instance) withDefaults() Instance {
	if i.Name == "" {
		i.Name = defaultName
	}
	if i.BPFFS == "" {
		i.BPFFS = defaultBPFFS
	}
	if i.RunDir == "" {
		i.RunDir = defaultRunDir
	}
	return i
}

// String is how errors speak of the instance.
func (i Instance) String() string { return "instance " + i.withDefaults().Name }

// Dir is the directory with the instance's pins.
func (i Instance) Dir() string {
	i = i.withDefaults()
	return filepath.Join(i.BPFFS, "tcnat", i.Name)
}

// staged is where a first attach builds, retired what a detach is taking away.
func (i Instance) staged() string  { return i.Dir() + "+new" }
func (i Instance) retired() string { return i.Dir() + "+old" }

func (i Instance) lockPath() string {
	i = i.withDefaults()
	return filepath.Join(i.RunDir, i.Name+".lock")
}

// pins is the directory of one ABI within an instance's directory.
type pins string

func pinsIn(dir string) pins { return pins(filepath.Join(dir, "v"+strconv.Itoa(ABIVersion))) }

func (p pins) maps() string   { return filepath.Join(string(p), "maps") }
func (p pins) progs() string  { return filepath.Join(string(p), "progs") }
func (p pins) links() string  { return filepath.Join(string(p), "links") }
func (p pins) qdiscs() string { return filepath.Join(string(p), "qdiscs") }

func (p pins) make() error {
	for _, dir := range []string{p.maps(), p.progs(), p.links(), p.qdiscs()} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("make pin directory: %w", known(err))
		}
	}
	return nil
}

// present says whether the instance has pins of this ABI. Pins of another one, or a directory
// without any, are an error.
func (i Instance) present() (bool, error) {
	entries, err := os.ReadDir(i.Dir())
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("%s: %w", i, known(err))
	}
	want := filepath.Base(string(pinsIn("")))
	var others []string
	for _, entry := range entries {
		if entry.Name() == want {
			return true, nil
		}
		others = append(others, entry.Name())
	}
	if len(others) == 0 {
		return false, corrupt(i, fmt.Errorf("%s is empty", i.Dir()))
	}
	return false, fmt.Errorf("%s: %w (%s, this one needs %s): run tcnat detach first",
		i, ErrOtherABI, strings.Join(others, ", "), want)
}

func corrupt(i Instance, err error) error {
	return fmt.Errorf("%s: %w: %w: run tcnat detach, which cleans up, then attach again", i, ErrCorrupt, err)
}

func notAttached(i Instance) error {
	return fmt.Errorf("%s: %w: run tcnat attach first", i, ErrNotAttached)
}
