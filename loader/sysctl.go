package loader

import (
	"os"
	"path/filepath"
	"strings"
)

// readSysctl reads a setting of the current network namespace, named by its path, such as
// net/ipv4/ip_forward.
func readSysctl(path string) (string, error) {
	text, err := os.ReadFile(filepath.Join("/proc/sys", path))
	return strings.TrimSpace(string(text)), err
}
