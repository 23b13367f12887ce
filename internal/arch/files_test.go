package arch

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

const (
	root     = "../.."
	maxLines = 500
)

// longFiles are the source files over maxLines, each with the reason why it is not split.
var longFiles = map[string]string{}

// forbidden is what no file may hold. The patterns are written so that they do not match
// their own text.
var forbidden = []struct {
	what    string
	pattern *regexp.Regexp
}{
	{"the host of a package registry: use its ordinary client", regexp.MustCompile(
		`(?:proxy|sum)[.]golang[.]org|(?:deb|security|snapshot)[.]debian[.]org|registry[.]npmjs[.]org|ghcr[.]io/|quay[.]io/`)},
	{"a path of somebody's machine", regexp.MustCompile(`(?:^|[^[:word:]$}.])/(?:work|root|home)/[[:word:].]`)},
	{"something left for later: do it or file it", regexp.MustCompile(`\b(?:TO[D]O|FIX[M]E|XX[X]|HAC[K])\b`)},
}

func TestNoFileHoldsWhatItMustNot(t *testing.T) {
	for path, content := range repository(t) {
		for _, rule := range forbidden {
			if found := rule.pattern.Find(content); found != nil {
				line := 1 + bytes.Count(content[:bytes.Index(content, found)], []byte("\n"))
				t.Errorf("%s:%d: %q: %s", path, line, found, rule.what)
			}
		}
	}
}

func TestFilesAreShort(t *testing.T) {
	reasons := make(map[string]bool)
	for path, content := range repository(t) {
		switch filepath.Ext(path) {
		case ".go", ".c", ".h":
		default:
			continue
		}
		lines := bytes.Count(content, []byte("\n"))
		if lines <= maxLines || isGenerated(path) {
			continue
		}
		reasons[path] = true
		if longFiles[path] == "" {
			t.Errorf("%s: %d lines: split it, or give the reason in longFiles", path, lines)
		}
	}
	for path := range longFiles {
		if !reasons[path] {
			t.Errorf("%s is in longFiles and is not long", path)
		}
	}
}

// repository returns every file by its path from the top, without git's and what is built.
func repository(t *testing.T) map[string][]byte {
	t.Helper()
	files := make(map[string][]byte)
	err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		if entry.IsDir() && (name == ".git" || name == ".cache" || name == "bin") {
			return filepath.SkipDir
		}
		if !entry.Type().IsRegular() {
			return nil
		}
		files[name], err = os.ReadFile(path)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := files["go.mod"]; !ok {
		t.Fatalf("%s is not the top of the repository", root)
	}
	return files
}

func isGenerated(path string) bool {
	return strings.HasPrefix(path, "bpf/nat_bpf") || strings.HasPrefix(path, "internal/bench/rig_bpf")
}
