package loader

import (
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

const kernelBTF = "/sys/kernel/btf/vmlinux"

// checkRights tells what is missing before anything is touched. Capabilities of a user
// namespace pass here, and fail at the first system call instead.
func checkRights() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var sets [2]unix.CapUserData
	if err := unix.Capget(&header, &sets[0]); err != nil {
		return fmt.Errorf("read capabilities: %w", err)
	}
	have := func(capability int) bool {
		return sets[capability/32].Effective&(1<<(capability%32)) != 0
	}
	var missing []string
	for _, need := range []struct {
		name    string
		enough  int
		instead int
	}{
		{"CAP_BPF", unix.CAP_BPF, unix.CAP_SYS_ADMIN},
		{"CAP_NET_ADMIN", unix.CAP_NET_ADMIN, unix.CAP_NET_ADMIN},
		{"CAP_PERFMON", unix.CAP_PERFMON, unix.CAP_SYS_ADMIN},
	} {
		if !have(need.enough) && !have(need.instead) {
			missing = append(missing, need.name)
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("%w: needs %s (try sudo)", ErrNotPermitted, strings.Join(missing, ", "))
	}
	return nil
}

func checkBTF() error {
	if _, err := os.Stat(kernelBTF); err != nil {
		return fmt.Errorf("%w: %s is missing: needs a kernel built with CONFIG_DEBUG_INFO_BTF", ErrNoBTF, kernelBTF)
	}
	return nil
}
