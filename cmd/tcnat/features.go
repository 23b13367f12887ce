package main

import (
	"github.com/spf13/cobra"

	"tcnat/loader"
)

func newFeatures(e *env) *cobra.Command {
	var output outputFlag
	cmd := &cobra.Command{
		Use:     "features",
		Short:   "what this kernel offers, what tcnat uses of it, what it falls back to",
		Example: "  tcnat features\n  tcnat features -o json",
		Args:    noArgs,
		RunE: e.inNetns(func(*cobra.Command) error {
			features, err := loader.Features()
			if err != nil {
				return err
			}
			return e.printFeatures(features, output.json())
		}),
	}
	output.bind(cmd)
	return cmd
}

type featureEntry struct {
	Name     string `json:"name"`
	Since    string `json:"since"`
	Have     bool   `json:"have"`
	Required bool   `json:"required,omitempty"`
	Use      string `json:"use"`
	Fallback string `json:"fallback,omitempty"`
}

func (e *env) printFeatures(features []loader.Feature, asJSON bool) error {
	entries := make([]featureEntry, 0, len(features))
	rows := table{heads: []string{"FEATURE", "KERNEL", "HERE", "WHAT TCNAT DOES WITH IT"}}
	for _, feature := range features {
		entries = append(entries, featureEntry(feature))
		here, use := "yes", feature.Use
		switch {
		case !feature.Have && feature.Required:
			here, use = "no", "tcnat does not work without it: "+feature.Use
		case !feature.Have:
			here, use = "no", "instead: "+feature.Fallback
		}
		rows.add(feature.Name, feature.Since, here, use)
	}
	if asJSON {
		return writeJSON(e.stdout, entries)
	}
	return rows.write(e.stdout)
}
