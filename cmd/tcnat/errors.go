package main

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// usageError indicates that the command line itself is wrong: exit code 2.
type usageError struct{ err error }

func (u *usageError) Error() string { return u.err.Error() }
func (u *usageError) Unwrap() error { return u.err }

func usagef(format string, args ...any) error {
	return &usageError{err: fmt.Errorf(format, args...)}
}

// asUsage marks an error as one of the command line; nil stays nil.
func asUsage(err error) error {
	if err == nil {
		return nil
	}
	return &usageError{err: err}
}

// flagError turns what pflag says into our words. Values that our own parsers refused
// name themselves; others are named by their flag.
func flagError(_ *cobra.Command, err error) error {
	var invalid *pflag.InvalidValueError
	if errors.As(err, &invalid) {
		var own *usageError
		if errors.As(invalid.Unwrap(), &own) {
			return own
		}
		cause := invalid.Unwrap()
		var number *strconv.NumError
		switch {
		case errors.As(cause, &number) && invalid.GetFlag().Value.Type() == "bool":
			cause = errors.New("takes true or false")
		case errors.As(cause, &number) && errors.Is(number, strconv.ErrRange):
			cause = errors.New("out of range")
		case errors.As(cause, &number):
			cause = errors.New("not a whole number")
		}
		return usagef("--%s %s: %w", invalid.GetFlag().Name, invalid.GetValue(), cause)
	}
	var unknown *pflag.NotExistError
	if errors.As(err, &unknown) {
		name := "--" + unknown.GetSpecifiedName()
		if unknown.GetSpecifiedShortnames() != "" {
			name = "-" + unknown.GetSpecifiedName()
		}
		return usagef("%s: no such flag (see --help)", name)
	}
	var missing *pflag.ValueRequiredError
	if errors.As(err, &missing) {
		return usagef("--%s: its value is missing", missing.GetFlag().Name)
	}
	return asUsage(err)
}

// oneLine makes sure that an error is one line, whatever it quotes.
func oneLine(text string) string {
	return strings.Join(strings.FieldsFunc(text, func(r rune) bool { return r == '\n' || r == '\r' }), " | ")
}
