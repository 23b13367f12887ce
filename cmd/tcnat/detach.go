package main

import (
	"github.com/spf13/cobra"

	"tcnat/loader"
)

func newDetach(e *env) *cobra.Command {
	return &cobra.Command{
		Use:   "detach",
		Short: "remove programs, rules, flows and pins",
		Long: `Removes everything that attach or load made: programs, rules, flows, pins, and the clsact
qdisc where attach made it. It cleans up a damaged instance too. Nothing there is done.`,
		Example: "  tcnat detach\n  tcnat detach --instance lab",
		Args:    noArgs,
		RunE: e.inNetns(func(cmd *cobra.Command) error {
			found, err := loader.Detach(cmd.Context(), e.instance)
			if err != nil {
				return err
			}
			if !found {
				e.notef("instance %s: not attached: nothing changed", e.instance.Name)
			}
			return nil
		}),
	}
}
