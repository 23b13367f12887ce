package main

import (
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"tcnat/internal/bench"
)

// benchTable prints a report for people: ratios first.
func benchTable(w io.Writer, r *bench.Report) error {
	fmt.Fprintln(w, benchHead(r))
	for _, m := range r.Measurements {
		fmt.Fprintf(w, "\n%s: %s\n", m.Name, m.Title)
		for _, note := range m.Notes {
			fmt.Fprintf(w, "  %s\n", note)
		}
		if m.Failure != "" {
			fmt.Fprintf(w, "  FAILED: %s\n", oneLine(m.Failure))
		}
		for _, c := range m.Cases {
			rows := table{heads: []string{strings.ToUpper(c.Name), "RATIO", "RANGE", "MEDIAN", "PATH", "NOTE"}}
			for _, row := range c.Rows {
				rows.add(row.Contender, ratioText(row.Ratio), rangeText(row), medianText(c, row), pathText(row), rowNote(row))
			}
			if err := rows.write(w); err != nil {
				return err
			}
		}
	}
	fmt.Fprintln(w)
	rows := table{heads: []string{"GOAL", "WANTED", "BEYOND", "REACHED", "MET"}}
	for _, g := range r.Goals {
		rows.add(goalCells(g)...)
	}
	return rows.write(w)
}

// benchMarkdown prints a report as docs/performance.md has it.
func benchMarkdown(w io.Writer, r *bench.Report) error {
	fmt.Fprintln(w, benchHead(r))
	for _, m := range r.Measurements {
		fmt.Fprintf(w, "\n### %s: %s\n", m.Name, m.Title)
		for _, note := range m.Notes {
			fmt.Fprintf(w, "\n%s\n", note)
		}
		if m.Failure != "" {
			fmt.Fprintf(w, "\nFAILED: %s\n", oneLine(m.Failure))
		}
		markdownCases(w, m.Cases)
	}
	fmt.Fprint(w, "\n### Goals\n\n")
	cells := [][]string{{"goal", "wanted", "beyond", "reached", "met"}}
	for _, g := range r.Goals {
		cells = append(cells, goalCells(g))
	}
	return markdownTable(w, cells)
}

// markdownCases makes one table of the cases: a line a contender, a column a case.
func markdownCases(w io.Writer, cases []bench.Case) {
	if len(cases) == 0 {
		return
	}
	var names []string
	heads := []string{""}
	for _, c := range cases {
		heads = append(heads, c.Name)
		for _, row := range c.Rows {
			if !slices.Contains(names, row.Contender) {
				names = append(names, row.Contender)
			}
		}
	}
	cells := [][]string{heads}
	for _, name := range names {
		line := []string{name}
		for _, c := range cases {
			line = append(line, markdownCell(c, name))
		}
		cells = append(cells, line)
	}
	fmt.Fprintln(w)
	_ = markdownTable(w, cells) // an error shows at the next write
}

func markdownCell(c bench.Case, contender string) string {
	at := slices.IndexFunc(c.Rows, func(r bench.Row) bool { return r.Contender == contender })
	if at < 0 {
		return ""
	}
	row := c.Rows[at]
	if len(row.Values) == 0 {
		return rowNote(row)
	}
	cell := medianText(c, row)
	if row.Ratio != 0 {
		cell = fmt.Sprintf("**%s** [%s] %s", ratioText(row.Ratio), rangeText(row), cell)
	}
	if row.PathNs != 0 {
		cell += ", path " + pathText(row)
	}
	if note := rowNote(row); note != "" {
		cell += "; " + note
	}
	return cell
}

func markdownTable(w io.Writer, cells [][]string) error {
	for i, line := range cells {
		escaped := make([]string, len(line))
		for j, cell := range line {
			escaped[j] = strings.ReplaceAll(cell, "|", `\|`)
		}
		if _, err := fmt.Fprintf(w, "| %s |\n", strings.Join(escaped, " | ")); err != nil {
			return err
		}
		if i == 0 {
			fmt.Fprintf(w, "|%s\n", strings.Repeat("---|", len(line)))
		}
	}
	return nil
}

// benchHead says what was measured where.
func benchHead(r *bench.Report) string {
	s, m := r.Settings, r.Machine
	var b strings.Builder
	fmt.Fprintf(&b, "tcnat %s, commit %s, %s, took %s\n\n", r.Version, orDash(r.Commit), r.Started.Format(time.DateTime), r.Duration.Round(time.Second))
	fmt.Fprintf(&b, "Kernel %s, HZ %s, %s of %s\n\n", m.Kernel, orDash(m.HZ), count(m.CPUs, "CPU"), m.Model)
	var mitigations []string
	for _, name := range slices.Sorted(maps.Keys(m.Mitigations)) {
		mitigations = append(mitigations, name+": "+m.Mitigations[name])
	}
	fmt.Fprintf(&b, "Mitigations: %s\n\n", orDash(strings.Join(mitigations, "; ")))
	fmt.Fprintf(&b, "Settings: %s of %s each (TCP streams %d), bridge-nf-call-iptables=%d, rp_filter=%d, frames of %d bytes, %s, nf_conntrack_max=%s, nf_conntrack_buckets=%s, seed %d",
		count(s.Pairs, "pair"), s.RunTime, s.StreamPairs, s.BridgeNF, s.ReversePath, s.FrameBytes, count(s.Containers, "container"),
		orDash(s.ConntrackMax), orDash(s.ConntrackBuckets), s.Seed)
	if s.Short {
		b.WriteString("\n\nA short run: it shows that all works, its figures are rough")
	}
	return b.String()
}

func goalCells(g bench.GoalResult) []string {
	sign := ">= "
	if g.AtMost {
		sign = "<= "
	}
	wanted, beyond, reached, met := sign+number(g.Want), "-", "not measured", "-"
	if g.Want == 0 {
		wanted = "-"
	}
	if g.Beyond != 0 {
		beyond = sign + number(g.Beyond)
	}
	if g.Measured {
		reached, met = number(g.Value), "no"
		if g.Met {
			met = "yes"
		}
		if g.Want == 0 {
			met = "-"
		}
	}
	return []string{g.Goal, wanted, beyond, reached, met}
}

func ratioText(ratio float64) string {
	if ratio == 0 {
		return "-"
	}
	if ratio < 0.1 {
		return strconv.FormatFloat(ratio, 'f', 4, 64)
	}
	return strconv.FormatFloat(ratio, 'f', 2, 64)
}

func rangeText(row bench.Row) string {
	if len(row.Pairs) == 0 {
		return "-"
	}
	return ratioText(row.RatioMin) + "-" + ratioText(row.RatioMax)
}

func medianText(c bench.Case, row bench.Row) string {
	if len(row.Values) == 0 {
		return "-"
	}
	return number(row.Median) + " " + c.Unit
}

func pathText(row bench.Row) string {
	if row.PathNs == 0 {
		return "-"
	}
	return fmt.Sprintf("%.0f ns", row.PathNs)
}

func rowNote(row bench.Row) string {
	if row.Failure != "" {
		return "FAILED: " + oneLine(row.Failure)
	}
	return row.Note
}

// number prints three digits or more of a value, with k for thousands.
func number(v float64) string {
	switch magnitude := math.Abs(v); {
	case magnitude >= 10_000:
		return strconv.FormatFloat(v/1000, 'f', 0, 64) + "k"
	case magnitude >= 100:
		return strconv.FormatFloat(v, 'f', 0, 64)
	case magnitude >= 10:
		return strconv.FormatFloat(v, 'f', 1, 64)
	}
	return strconv.FormatFloat(v, 'f', 2, 64)
}
