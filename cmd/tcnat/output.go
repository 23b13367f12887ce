package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
)

// format is how a list is printed.
type format string

const (
	formatTable format = "table"
	formatJSON  format = "json"
)

// outputFlag is the -o of commands that list.
type outputFlag struct{ once[format] }

func (o *outputFlag) bind(cmd *cobra.Command) {
	bindOnce(cmd.Flags(), &o.once, "output", "o", "FORMAT", "FORMAT of the result: table (default) or json",
		word("output", map[string]format{"table": formatTable, "json": formatJSON}, "table", "json"))
	completeWords(cmd, "output", "table", "json")
}

func (o *outputFlag) json() bool { return o.value == formatJSON }

// table is what a list prints for people: columns under headings.
type table struct {
	heads []string
	rows  [][]string
}

func (t *table) add(cells ...string) { t.rows = append(t.rows, cells) }

// write prints the table; nothing but the headings when it is empty.
func (t *table) write(w io.Writer) error {
	tabs := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(tabs, strings.Join(t.heads, "\t"))
	for _, row := range t.rows {
		fmt.Fprintln(tabs, strings.Join(row, "\t"))
	}
	return tabs.Flush()
}

// writeJSON prints a value as indented JSON.
func writeJSON(w io.Writer, value any) error {
	encoder := json.NewEncoder(w)
	encoder.SetEscapeHTML(false)
	encoder.SetIndent("", "  ")
	return encoder.Encode(value)
}

// orDash is what a cell shows for nothing.
func orDash(text string) string {
	if text == "" {
		return "-"
	}
	return text
}
