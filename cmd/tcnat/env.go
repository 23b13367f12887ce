package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"

	"github.com/spf13/cobra"

	"tcnat/loader"
)

// env is everything a command touches of the world, so that a test runs the whole command
// line in-process: where it writes, which datapath it means, and the global flags' values.
type env struct {
	stdout io.Writer
	stderr io.Writer

	instance loader.Instance
	netns    string
	verbose  bool

	// attach is loader.Attach; a test puts a failing one here.
	attach func(context.Context, loader.Instance, loader.AttachOptions, *slog.Logger) (*loader.Status, error)
}

func newEnv(stdout, stderr io.Writer) *env {
	return &env{stdout: stdout, stderr: stderr, instance: loader.Instance{Name: "default"}, attach: loader.Attach}
}

// logger writes what the loader has to tell: warnings, and with -v each step.
func (e *env) logger() *slog.Logger {
	level := slog.LevelWarn
	if e.verbose {
		level = slog.LevelDebug
	}
	return slog.New(lineHandler{w: e.stderr, level: level})
}

// inNetns makes a command's work happen in the network namespace of --netns.
func (e *env) inNetns(work func(*cobra.Command) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, _ []string) error {
		if e.netns == "" {
			return work(cmd)
		}
		return loader.InNetns(e.netns, func() error { return work(cmd) })
	}
}

// read runs work on the attached instance; it may be shared with other readers.
func (e *env) read(work func(*loader.Datapath) error) error {
	return e.with(loader.Open, work)
}

// write runs work on the attached instance with its lock held.
func (e *env) write(work func(*loader.Datapath) error) error {
	return e.with(loader.OpenForWrite, work)
}

func (e *env) with(open func(loader.Instance) (*loader.Datapath, error), work func(*loader.Datapath) error) error {
	datapath, err := open(e.instance)
	if err != nil {
		return err
	}
	defer datapath.Close()
	return work(datapath)
}

// warnf tells on stderr of something the user should look at.
func (e *env) warnf(format string, args ...any) {
	fmt.Fprintf(e.stderr, "warning: %s\n", oneLine(fmt.Sprintf(format, args...)))
}

// notef tells on stderr what happened, where that is not obvious.
func (e *env) notef(format string, args ...any) {
	fmt.Fprintf(e.stderr, "%s\n", oneLine(fmt.Sprintf(format, args...)))
}
