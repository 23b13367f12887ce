// Command tcnat manages NAT for container bridges that is done by eBPF programs in TC.
//
// One file a noun; this one has the root command and what every command shares: global
// flags, exit codes (0 done, 1 failed, 2 wrong usage) and the one line that an error gets.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"tcnat/loader"
)

const (
	exitDone   = 0
	exitFailed = 1
	exitUsage  = 2
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx, newEnv(os.Stdout, os.Stderr), os.Args[1:]))
}

// run executes one command line and returns its exit code.
func run(ctx context.Context, e *env, args []string) int {
	cmd, err := execute(ctx, e, args)
	if err == nil {
		return exitDone
	}
	fmt.Fprintf(e.stderr, "%s: %s\n", cmd.CommandPath(), oneLine(err.Error()))
	e.printVerifierLog(err)
	var usage *usageError
	if errors.As(err, &usage) {
		return exitUsage
	}
	return exitFailed
}

// execute is run for a caller in this process: it returns the error, and the command that had it.
func execute(ctx context.Context, e *env, args []string) (*cobra.Command, error) {
	root := newRoot(e)
	root.SetArgs(args)
	root.SetOut(e.stdout)
	root.SetErr(e.stderr)
	return root.ExecuteContextC(ctx)
}

func newRoot(e *env) *cobra.Command {
	root := &cobra.Command{
		Use:   "tcnat",
		Short: "NAT for container bridges, done in eBPF",
		Long: `tcnat lets containers behind a bridge reach the world, and the world their
published ports, without any iptables or nftables rule: TC programs on the bridge and
on the uplink translate packets, all state lives in pinned BPF maps, and no process has
to stay running.`,
		Example: `  # Containers on docker0 reach the world through eth0:
  tcnat attach --bridge docker0 --uplink eth0
  # The world reaches a container's port 3005:
  tcnat dnat add -p tcp --dport 3005 --to-destination 172.17.0.2:3005
  tcnat status
  tcnat detach`,
		Version:       version(),
		Args:          cobra.ArbitraryArgs,
		RunE:          runNoun,
		SilenceErrors: true,
		SilenceUsage:  true,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			return errors.Join(checkOnce(cmd.Flags()), checkInstanceName(e.instance.Name))
		},
	}
	root.SetFlagErrorFunc(flagError)
	flags := root.PersistentFlags()
	flags.StringVar(&e.instance.Name, "instance", e.instance.Name, "`NAME` of the datapath to work on")
	flags.StringVar(&e.netns, "netns", "", "work in this network namespace: `NAME|PATH`, a name is one in /run/netns")
	flags.BoolVarP(&e.verbose, "verbose", "v", false, "say more on stderr")
	flags.StringVar(&e.instance.BPFFS, "bpffs", e.instance.BPFFS, "where the BPF file system is mounted")
	flags.StringVar(&e.instance.RunDir, "run-dir", e.instance.RunDir, "directory of the lock files")
	for _, name := range []string{"bpffs", "run-dir"} {
		if err := flags.MarkHidden(name); err != nil {
			panic(err)
		}
	}
	root.AddCommand(
		newAttach(e), newLoad(e), newDetach(e), newStatus(e),
		newSNAT(e), newDNAT(e), newFlows(e), newFeatures(e), newLab(e), newBench(e),
	)
	root.AddCommand(newUnbuilt("apply", "export", "import", "explain", "trace", "agent")...)
	finish(root)
	return root
}

// newUnbuilt makes commands that are named in the manual but refuse to run.
func newUnbuilt(names ...string) []*cobra.Command {
	var cmds []*cobra.Command
	for _, name := range names {
		cmds = append(cmds, &cobra.Command{
			Use:                name,
			Short:              "not built yet",
			Hidden:             true,
			DisableFlagParsing: true,
			RunE:               func(*cobra.Command, []string) error { return usagef("not built yet") },
		})
	}
	return cmds
}

// newNoun makes a command that does nothing but hold its verbs.
func newNoun(use, short, example string, verbs ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{Use: use, Short: short, Example: example, Args: cobra.ArbitraryArgs, RunE: runNoun}
	cmd.AddCommand(verbs...)
	return cmd
}

// runNoun answers a noun without a verb, or with an unknown one. The bare program prints
// its help: nobody has misspelt anything yet.
func runNoun(cmd *cobra.Command, args []string) error {
	if len(args) == 0 && !cmd.HasParent() {
		return cmd.Help()
	}
	var verbs []string
	for _, sub := range cmd.Commands() {
		if sub.IsAvailableCommand() && sub.Name() != "help" && sub.Name() != "completion" {
			verbs = append(verbs, sub.Name())
		}
	}
	if len(args) == 0 {
		return usagef("a verb is missing (have: %s)", strings.Join(verbs, ", "))
	}
	return usagef("%s: no such command (have: %s)", args[0], strings.Join(verbs, ", "))
}

// noArgs refuses words that belong to no flag.
func noArgs(_ *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usagef("%s: unexpected word (see --help)", args[0])
	}
	return nil
}

func checkInstanceName(name string) error {
	if len(name) < 1 || len(name) > 32 {
		return usagef("--instance %q: a name has 1 to 32 characters", name)
	}
	for _, c := range name {
		if !strings.ContainsRune("abcdefghijklmnopqrstuvwxyz0123456789_-", c) {
			return usagef("--instance %s: only a-z, 0-9, _ and - are allowed", name)
		}
	}
	return nil
}

func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok || info.Main.Version == "" {
		return "(devel)"
	}
	return info.Main.Version
}

// printVerifierLog shows why the kernel refused a program, after the one line that says it did.
func (e *env) printVerifierLog(err error) {
	const tail = 12
	lines := tail
	if e.verbose {
		lines = 0
	}
	if log := loader.VerifierLog(err, lines); log != "" {
		fmt.Fprintln(e.stderr, strings.TrimRight(log, "\n"))
	}
}
