package maps

import (
	"errors"
	"fmt"
)

var (
	// ErrInvalidRule indicates that a rule cannot mean anything: port 0, a reversed range,
	// mixed families and the like. The error's text says which.
	ErrInvalidRule = errors.New("invalid rule")

	// ErrRuleOverlap indicates that another rule already decides over the same packets. The
	// error's text names it.
	ErrRuleOverlap = errors.New("rules overlap")

	// ErrTooManyRules indicates that no id is left for a new rule.
	ErrTooManyRules = errors.New("too many rules")

	// ErrInvalidConfig indicates a configuration value out of its range.
	ErrInvalidConfig = errors.New("invalid configuration")

	// ErrInvalidPrefix indicates a subnet or address that the maps cannot hold.
	ErrInvalidPrefix = errors.New("invalid prefix")

	// ErrUnknownProtocol indicates a protocol name or number that means nothing here.
	ErrUnknownProtocol = errors.New("unknown protocol")
)

// fault is an error whose text stands alone and whose kind is one of the sentinels above.
type fault struct {
	kind error
	text string
}

func (f *fault) Error() string { return f.text }
func (f *fault) Unwrap() error { return f.kind }

func faultf(kind error, format string, args ...any) error {
	return &fault{kind: kind, text: fmt.Sprintf(format, args...)}
}

func invalid(format string, args ...any) error {
	return faultf(ErrInvalidRule, format, args...)
}
