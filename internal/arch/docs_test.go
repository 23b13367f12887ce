package arch

import (
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// namedTest is a test as the documentation names it: package, function, and a part of a subtest's name.
var namedTest = regexp.MustCompile("`([a-z0-9/]+)/(Test[A-Za-z0-9]+)(?:/([^`]+))?`")

// Each scenario has its row, each row a test or a reason.
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
				if !namedTest.MatchString(shown) && !strings.HasPrefix(shown, "Left out: ") {
					t.Errorf("scenario %d: %q is neither a test nor why there is none", number, shown)
				}
			}
		}
	}
	if next != 61 {
		t.Errorf("%d scenarios, want 60", next-1)
	}
}

// Each test that the documentation names exists.
func TestNamedTests(t *testing.T) {
	docs, err := filepath.Glob("../../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, doc := range docs {
		text, err := os.ReadFile(doc)
		if err != nil {
			t.Fatal(err)
		}
		for _, named := range namedTest.FindAllStringSubmatch(string(text), -1) {
			found++
			if problem := missing(t, named[1], named[2], named[3]); problem != "" {
				t.Errorf("%s: %s: %s", filepath.Base(doc), named[0], problem)
			}
		}
	}
	if found < 100 {
		t.Errorf("%d tests are named, want more", found)
	}
}

// reason is how a cell begins that says why no test shows a requirement.
var reason = regexp.MustCompile(`^ (not yet|no: |see |Docker |there are none)`)

// What RFC 2119 makes a must is met, by a test or a reason.
func TestRequirements(t *testing.T) {
	text, err := os.ReadFile("../../docs/behaviour.md")
	if err != nil {
		t.Fatal(err)
	}
	rows := 0
	for line := range strings.Lines(string(text)) {
		cells := strings.Split(strings.TrimSpace(line), "|")
		if len(cells) != 7 || !strings.HasPrefix(strings.TrimSpace(cells[2]), "MUST") {
			continue
		}
		rows++
		if !namedTest.MatchString(cells[5]) && !reason.MatchString(cells[4]) {
			t.Errorf("%s: neither a test nor a reason", line)
		}
	}
	if rows < 30 {
		t.Errorf("%d requirements are musts, want more", rows)
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
