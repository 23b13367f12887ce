package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"tcnat/internal/lab"
	"tcnat/loader"
)

const labName = "lab"

func newLab(e *env) *cobra.Command {
	var upName, downName string
	var options lab.Options
	up := &cobra.Command{
		Use:   "up",
		Short: "make namespaces: containers on docker0, their host, an internet",
		Long: `Makes network namespaces that stand until "tcnat lab down": containers on a bridge named
docker0, a host with the uplink eth0, and a world behind routers that knows nothing of the
containers' addresses. Nothing is attached; try the other commands in it with --netns.`,
		Example: `  tcnat lab up
  tcnat --netns tcnat-lab-host attach --bridge docker0 --uplink eth0
  nsenter --net=/run/netns/tcnat-lab-c1 ping 1.1.1.1`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			options.Name = upName
			return e.labUp(cmd.Context(), options)
		},
	}
	up.Flags().StringVar(&upName, "name", labName, "`NAME` of the lab, part of its namespaces' names")
	up.Flags().IntVar(&options.Containers, "containers", 1, "how many containers")
	up.Flags().BoolVar(&options.SecondUplink, "second-uplink", false, "give the host a second uplink, eth1")

	down := &cobra.Command{
		Use:   "down",
		Short: "remove what up made",
		Long: `Removes the namespaces that up made. What is attached in them goes too, but not its pins:
detach first.`,
		Example: "  tcnat --netns tcnat-lab-host detach\n  tcnat lab down",
		Args:    noArgs,
		RunE: func(*cobra.Command, []string) error {
			err := lab.Down(downName)
			if errors.Is(err, lab.ErrNotFound) {
				e.notef("%s: nothing changed", err)
				return nil
			}
			return err
		},
	}
	down.Flags().StringVar(&downName, "name", labName, "`NAME` of the lab")

	demo := &cobra.Command{
		Use:   "demo",
		Short: "show in a throw-away lab what tcnat does, step by step",
		Long: `Builds a lab and shows the ping that gets no reply, attaches, shows ping, TCP, UDP and
published ports at work, the flow table, and detaches. It ends with 0 only if each step did
what it says, and leaves nothing behind.`,
		Example: "  tcnat lab demo",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return lab.Demo(cmd.Context(), e.stdout, lab.DemoTool{
				Run: e.runInDemo,
				PinDir: func(instance string) string {
					return loader.Instance{Name: instance, BPFFS: e.instance.BPFFS}.Dir()
				},
			})
		},
	}
	return newNoun("lab", "throw-away namespaces: a container, a host, an internet", "  tcnat lab demo", up, down, demo)
}

func (e *env) labUp(ctx context.Context, options lab.Options) error {
	l, err := lab.New(ctx, options)
	if err != nil {
		return err
	}
	rows := table{heads: []string{"NAMESPACE", "ROLE", "IPV4", "IPV6"}}
	for _, node := range l.Nodes() {
		rows.add(node.Netns, node.Role, node.Addr(lab.IPv4).String(), node.Addr(lab.IPv6).String())
	}
	if err := l.Release(); err != nil {
		return err
	}
	return rows.write(e.stdout)
}

// runInDemo executes one command line for the demo, in this process.
func (e *env) runInDemo(ctx context.Context, stdout io.Writer, args ...string) error {
	inner := newEnv(stdout, e.stderr)
	inner.instance = e.instance
	cmd, err := execute(ctx, inner, args)
	if err != nil {
		return fmt.Errorf("%s: %w", cmd.CommandPath(), err)
	}
	return nil
}
