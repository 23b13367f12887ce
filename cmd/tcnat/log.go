package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"strings"
)

// lineHandler writes what the loader logs as our other lines on stderr are: the message,
// and in brackets what it is about.
type lineHandler struct {
	w     io.Writer
	level slog.Level
	attrs []slog.Attr
}

var _ slog.Handler = lineHandler{}

func (h lineHandler) Enabled(_ context.Context, level slog.Level) bool { return level >= h.level }

func (h lineHandler) Handle(_ context.Context, record slog.Record) error {
	var about []string
	note := func(attr slog.Attr) bool {
		about = append(about, attr.String())
		return true
	}
	for _, attr := range h.attrs {
		note(attr)
	}
	record.Attrs(note)
	line := record.Message
	if len(about) > 0 {
		line += " (" + strings.Join(about, " ") + ")"
	}
	if record.Level >= slog.LevelWarn {
		line = "warning: " + line
	}
	_, err := fmt.Fprintln(h.w, oneLine(line))
	return err
}

func (h lineHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	h.attrs = append(h.attrs[:len(h.attrs):len(h.attrs)], attrs...)
	return h
}

// WithGroup leaves groups out: nothing that is logged here has any.
func (h lineHandler) WithGroup(string) slog.Handler { return h }
