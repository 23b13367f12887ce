package main

import (
	"maps"
	"slices"

	"github.com/spf13/cobra"
)

// completeWords completes a flag's value with a few words.
func completeWords(cmd *cobra.Command, flag string, words ...string) {
	complete(cmd, flag, cobra.FixedCompletions(words, cobra.ShellCompDirectiveNoFileComp))
}

// completeDevices completes a flag's value with the names of network devices.
func completeDevices(cmd *cobra.Command, flags ...string) {
	for _, flag := range flags {
		complete(cmd, flag, func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			have, err := listDevices()
			if err != nil {
				return nil, cobra.ShellCompDirectiveError
			}
			return slices.Sorted(maps.Values(have)), cobra.ShellCompDirectiveNoFileComp
		})
	}
}

// complete registers a completion; that fails only for a flag that is not there.
func complete(cmd *cobra.Command, flag string, fn cobra.CompletionFunc) {
	if err := cmd.RegisterFlagCompletionFunc(flag, fn); err != nil {
		panic(err)
	}
}

// finish sets for a command and all below it what cobra has the wrong way round for us:
// flags in the order in which they are declared, usage lines as written, no file names
// offered to commands that take no words.
func finish(cmd *cobra.Command) {
	cmd.Flags().SortFlags = false
	cmd.DisableFlagsInUseLine = true
	if cmd.ValidArgsFunction == nil {
		cmd.ValidArgsFunction = cobra.NoFileCompletions
	}
	for _, sub := range cmd.Commands() {
		finish(sub)
	}
}
