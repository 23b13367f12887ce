package loader

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// memoryLimit is one that holds for a process: its own cgroup's, or one above.
type memoryLimit struct {
	file  string
	bytes uint64
}

// unlimited is what cgroup v1 says for none: the largest number of whole pages, and more.
const unlimited = 1 << 60

// memoryLimits reads cgroup v2 and v1 by <proc>/cgroup and <proc>/mountinfo.
func memoryLimits(proc string) []memoryLimit {
	cgroups, _ := os.ReadFile(filepath.Join(proc, "cgroup"))
	mounts, _ := os.ReadFile(filepath.Join(proc, "mountinfo"))
	var limits []memoryLimit
	for line := range strings.Lines(string(cgroups)) {
		// 0::/user.slice        and        5:memory:/user.slice
		fields := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(fields) != 3 {
			continue
		}
		kind, file := "", ""
		switch {
		case fields[0] == "0" && fields[1] == "":
			kind, file = "cgroup2", "memory.max"
		case hasWord(fields[1], "memory"):
			kind, file = "cgroup", "memory.limit_in_bytes"
		default:
			continue
		}
		root, top := cgroupMount(string(mounts), kind)
		if root == "" {
			continue
		}
		inside, ok := strings.CutPrefix(fields[2], strings.TrimSuffix(top, "/"))
		if !ok {
			continue
		}
		for dir := filepath.Join(root, inside); strings.HasPrefix(dir, root); dir = filepath.Dir(dir) {
			path := filepath.Join(dir, file)
			text, err := os.ReadFile(path)
			if err != nil {
				continue // the root has no limit
			}
			bytes, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
			if err == nil && bytes < unlimited { // "max" is no number
				limits = append(limits, memoryLimit{path, bytes})
			}
		}
	}
	return limits
}

// cgroupMount finds where the hierarchy is mounted, and which cgroup is seen there.
func cgroupMount(mounts, kind string) (point, top string) {
	for line := range strings.Lines(mounts) {
		// 36 35 98:0 /root /mount/point rw,noatime master:1 - cgroup2 cgroup2 rw,memory
		left, right, ok := strings.Cut(line, " - ")
		fields, tail := strings.Fields(left), strings.Fields(right)
		if !ok || len(fields) < 5 || len(tail) < 3 || tail[0] != kind {
			continue
		}
		if kind == "cgroup" && !hasWord(tail[2], "memory") {
			continue
		}
		return fields[4], fields[3]
	}
	return "", ""
}

func hasWord(list, word string) bool {
	for part := range strings.SplitSeq(list, ",") {
		if part == word {
			return true
		}
	}
	return false
}
