package loader

import (
	"errors"
	"fmt"
	"os"

	"github.com/cilium/ebpf/link"
)

var (
	// ErrBadInstance indicates an instance name outside [a-z0-9_-]{1,32}.
	ErrBadInstance = errors.New("bad instance name")
	// ErrNotAttached indicates that the instance has no pins.
	ErrNotAttached = errors.New("not attached")
	// ErrLocked indicates that another process works on the instance.
	ErrLocked = errors.New("locked")
	// ErrNoDevice indicates a network device that does not exist.
	ErrNoDevice = errors.New("no such device")
	// ErrBadDevice indicates a device that cannot play the part it is named for.
	ErrBadDevice = errors.New("unsuitable device")
	// ErrNotPermitted indicates that capabilities are missing.
	ErrNotPermitted = errors.New("not permitted")
	// ErrNoBTF indicates a kernel without BTF of its own.
	ErrNoBTF = errors.New("no BTF")
	// ErrNoBPFFS indicates that the directory for pins is on no BPF file system.
	ErrNoBPFFS = errors.New("no BPF file system")
	// ErrCorrupt indicates pins that are incomplete or are not what their name says.
	ErrCorrupt = errors.New("damaged pins")
	// ErrNotSupported indicates a feature that this kernel lacks.
	ErrNotSupported = errors.New("not supported by this kernel")
	// ErrOtherNetns indicates an instance of another network namespace.
	ErrOtherNetns = errors.New("belongs to another network namespace")
	// ErrOtherABI indicates pins made by a version with other table layouts.
	ErrOtherABI = errors.New("made by an incompatible version")
	// ErrConflict indicates a request that what is attached already rules out.
	ErrConflict = errors.New("conflicts with what is attached")
	// ErrMarkUsed indicates a bit of the packet mark that the host's routing looks at.
	ErrMarkUsed = errors.New("bit is in use")
	// ErrBadCgroup indicates a path that is no directory of cgroup v2.
	ErrBadCgroup = errors.New("unsuitable cgroup")
	// ErrNoNetns indicates a network namespace that does not exist.
	ErrNoNetns = errors.New("no such network namespace")
)

// known turns the errors of the kernel and of libraries into the sentinels above, once.
func known(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, ErrNotPermitted), errors.Is(err, ErrNotSupported):
		return err
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("%w: %w: needs CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON (try sudo)", ErrNotPermitted, err)
	case errors.Is(err, link.ErrNotSupported):
		return fmt.Errorf("%w: %w", ErrNotSupported, err)
	default:
		return err
	}
}
