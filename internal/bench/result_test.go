package bench

import (
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"os"
	"strings"
	"testing"
)

func TestMedian(t *testing.T) {
	for _, tc := range []struct {
		values []float64
		want   float64
	}{{nil, 0}, {[]float64{3}, 3}, {[]float64{9, 1, 5}, 5}, {[]float64{4, 1, 3, 2}, 2.5}} {
		if got := median(tc.values); got != tc.want {
			t.Errorf("median of %v is %v, want %v", tc.values, got, tc.want)
		}
	}
}

func TestQuantile(t *testing.T) {
	var hundred []float64
	for i := range 100 {
		hundred = append(hundred, float64(i))
	}
	for _, tc := range []struct{ q, want float64 }{{0, 0}, {0.5, 50}, {0.99, 99}, {1, 99}} {
		if got := quantile(hundred, tc.q); got != tc.want {
			t.Errorf("quantile %v is %v, want %v", tc.q, got, tc.want)
		}
	}
}

// exampleReport has a contender at 1.5 of plain and 0.25 of iptables' path cost.
func exampleReport() *Report {
	c := Case{Name: "1 flow", Unit: unitPackets, Baseline: plain, Rows: []Row{
		{Contender: plain, Values: []float64{1e6, 1e6}},
		{Contender: floor, Values: []float64{2e6}, Pairs: []float64{2}},
		{Contender: iptables, Values: []float64{800e3}, Pairs: []float64{0.8}},
		{Contender: tcnatLeased, Values: []float64{1.45e6, 1.5e6, 1.6e6}, Pairs: []float64{1.45, 1.5, 1.6}},
	}}
	c.settle()
	return &Report{Measurements: []Measurement{{Name: "out", Title: "out", Cases: []Case{c}}}}
}

func TestSettle(t *testing.T) {
	c, _ := exampleReport().find("out", "1 flow")
	row, ok := c.row(tcnatLeased)
	if !ok || row.Median != 1.5e6 || row.Ratio != 1.5 || row.RatioMin != 1.45 || row.RatioMax != 1.6 {
		t.Errorf("%+v", row)
	}
	if base, _ := c.row(plain); base.PathNs != 500 || base.Ratio != 0 {
		t.Errorf("%+v", base)
	}
	if ground, _ := c.row(floor); ground.PathNs != 0 {
		t.Errorf("%+v", ground)
	}
}

func TestLowerIsBetterTurnsRatiosAround(t *testing.T) {
	if got := (&Case{LowerIsBetter: true}).ratio(50, 100); got != 2 {
		t.Errorf("half the latency is %v", got)
	}
	if got := (&Case{}).ratio(50, 100); got != 0.5 {
		t.Errorf("half the rate is %v", got)
	}
}

func TestGoals(t *testing.T) {
	results := map[string]GoalResult{}
	for _, g := range exampleReport().judge() {
		results[g.Goal] = g
	}
	if g := results["out, 1 flow: x plain"]; !g.Measured || !g.Met || g.Value != 1.5 {
		t.Errorf("%+v", g)
	}
	if g := results["out, 1 flow: path cost, x iptables'"]; !g.Measured || !g.Met || g.Value < 0.22 || g.Value > 0.23 {
		t.Errorf("%+v", g)
	}
	if g := results["attach, ms"]; g.Measured || g.Met {
		t.Errorf("%+v", g)
	}
}

// TestGoalsNameWhatIsMeasured makes a report of all that a full run measures, and expects each
// goal to find its value there.
func TestGoalsNameWhatIsMeasured(t *testing.T) {
	known := map[string]bool{}
	for _, name := range Names() {
		known[name] = true
	}
	for _, name := range []string{"out", "in", "out-partial", "in-partial", "new", "flows", "rules", "stream", "crr", "twocpu", "memory", "host", "attach"} {
		if !known[name] {
			t.Errorf("%s is in a goal and is no measurement", name)
		}
	}
}

func TestReportAsJSON(t *testing.T) {
	report := exampleReport()
	report.Goals = report.judge()
	text, err := json.Marshal(report)
	if err != nil {
		t.Fatal(err)
	}
	var back Report
	if err := json.Unmarshal(text, &back); err != nil {
		t.Fatal(err)
	}
	if c, ok := back.find("out", "1 flow"); !ok || len(c.Rows[3].Values) != 3 || c.Rows[3].Ratio != 1.5 {
		t.Errorf("%s", text)
	}
}

func TestPlot(t *testing.T) {
	files, err := exampleReport().Plot(t.TempDir())
	if err != nil || len(files) != 1 {
		t.Fatalf("%v, %v", files, err)
	}
	text, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	for decoder := xml.NewDecoder(strings.NewReader(string(text))); ; {
		if _, err := decoder.Token(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatalf("not XML: %v", err)
		}
	}
	for _, want := range []string{"<svg", tcnatLeased, iptables} {
		if !strings.Contains(string(text), want) {
			t.Errorf("%s is not in the plot", want)
		}
	}
}

func TestFailed(t *testing.T) {
	report := exampleReport()
	if report.Failed() {
		t.Error("nothing failed")
	}
	report.Measurements[0].Cases[0].Rows[1].Failure = "broken"
	if !report.Failed() {
		t.Error("a row failed")
	}
}
