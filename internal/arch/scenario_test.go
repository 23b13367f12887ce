package arch

import (
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// namedTest is a test as docs/scenarios.md names it: package, function, and a part of a subtest's name.
var namedTest = regexp.MustCompile("`([a-z0-9/]+)/(Test[A-Za-z0-9]+)(?:/([^`]+))?`")

// Each scenario has its row, each row a test or a reason, and each test that is named exists.
func TestScenarios(t *testing.T) {
	text, err := os.ReadFile("../../docs/scenarios.md")
	if err != nil {
		t.Fatal(err)
	}
	next := 1
	for line := range strings.Lines(string(text)) {
		cells := strings.Split(line, "|")
		if len(cells) == 5 {
			if number, err := strconv.Atoi(strings.TrimSpace(cells[1])); err == nil {
				if number != next {
					t.Errorf("scenario %d comes where %d should", number, next)
				}
				next++
				shown := strings.TrimSpace(cells[3])
				if !namedTest.MatchString(shown) && !strings.HasPrefix(shown, "Left out: ") && shown != "not yet" {
					t.Errorf("scenario %d: %q is neither a test nor why there is none", number, shown)
				}
			}
		}
		for _, named := range namedTest.FindAllStringSubmatch(line, -1) {
			if problem := missing(t, named[1], named[2], named[3]); problem != "" {
				t.Errorf("%s: %s", named[0], problem)
			}
		}
	}
	if next != 61 {
		t.Errorf("%d scenarios, want 60", next-1)
	}
}

// missing tells what a package lacks of a test, "" if nothing. The name of a subtest is looked for as it is.
func missing(t *testing.T, dir, test, sub string) string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join("../..", dir, "*_test.go"))
	if err != nil || len(files) == 0 {
		return "no such package of tests"
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		_, body, found := strings.Cut(string(text), "\nfunc "+test+"(")
		if !found {
			continue
		}
		if body, _, _ = strings.Cut(body, "\n}\n"); sub != "" && !strings.Contains(body, strconv.Quote(sub)) {
			return "the test has no subtest of that name"
		}
		return ""
	}
	return "no such test"
}
