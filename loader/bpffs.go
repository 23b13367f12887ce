package loader

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// haveBPFFS says whether the instance's directory for pins is on a BPF file system.
func (i Instance) haveBPFFS() (bool, error) {
	var stat unix.Statfs_t
	dir := i.withDefaults().BPFFS
	err := unix.Statfs(dir, &stat)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("bpffs %s: %w", dir, known(err))
	}
	return uint32(stat.Type) == unix.BPF_FS_MAGIC, nil
}

// ensureBPFFS mounts the default one where it is missing, readable for root alone.
func (i Instance) ensureBPFFS() error {
	dir := i.withDefaults().BPFFS
	have, err := i.haveBPFFS()
	if err != nil {
		return err
	}
	if !have {
		if dir != defaultBPFFS {
			return fmt.Errorf("bpffs %s: %w: mount one (mount -t bpf -o mode=0700 bpf %s)", dir, ErrNoBPFFS, dir)
		}
		if err := unix.Mount("bpf", dir, "bpf", 0, "mode=0700"); err != nil {
			return fmt.Errorf("bpffs %s: %w: mount it: %w", dir, ErrNoBPFFS, known(err))
		}
	}
	if err := os.MkdirAll(filepath.Dir(i.Dir()), 0o700); err != nil {
		return fmt.Errorf("make pin directory: %w", known(err))
	}
	return nil
}
