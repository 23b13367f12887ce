package main

import (
	"fmt"
	"strings"

	"github.com/spf13/pflag"
)

// once is a flag whose text a pure function parses, and which may be given only once.
type once[T any] struct {
	value T
	isSet bool
	text  string
	parse func(string) (T, error)
	// times counts how often it was given: a second one is refused by checkOnce alone, since
	// completion parses the same words more than once.
	times int
	// again is what is said of a second one.
	again string
}

var _ pflag.Value = (*once[int])(nil)

// bindOnce adds the flag to fs. word is what the usage calls the value, e.g. "CIDR".
func bindOnce[T any](fs *pflag.FlagSet, o *once[T], name, shorthand, word, usage string, parse func(string) (T, error)) {
	o.parse = parse
	if o.again == "" {
		o.again = fmt.Sprintf("--%s: given twice", name)
	}
	fs.VarP(o, name, shorthand, backquote(word, usage))
}

func (o *once[T]) Set(text string) error {
	o.times++
	value, err := o.parse(text)
	if err != nil {
		return asUsage(err)
	}
	o.value, o.text, o.isSet = value, text, true
	return nil
}

// givenTwice is the complaint of a flag that was.
func (o *once[T]) givenTwice() error {
	if o.times > 1 {
		return usagef("%s", o.again)
	}
	return nil
}

// checkOnce refuses flags that were given more often than they may be.
func checkOnce(fs *pflag.FlagSet) error {
	var first error
	fs.Visit(func(flag *pflag.Flag) {
		if value, ok := flag.Value.(interface{ givenTwice() error }); ok && first == nil {
			first = value.givenTwice()
		}
	})
	return first
}

func (o *once[T]) String() string { return o.text }
func (o *once[T]) Type() string   { return "value" }

// many is a flag that repeats, each one parsed by a pure function; commas separate too.
type many[T any] struct {
	values []T
	texts  []string
	parse  func(string) (T, error)
}

var _ pflag.Value = (*many[int])(nil)

func bindMany[T any](fs *pflag.FlagSet, m *many[T], name, shorthand, word, usage string, parse func(string) (T, error)) {
	m.parse = parse
	fs.VarP(m, name, shorthand, backquote(word, usage))
}

func (m *many[T]) Set(text string) error {
	for _, part := range strings.Split(text, ",") {
		value, err := m.parse(part)
		if err != nil {
			return asUsage(err)
		}
		m.values, m.texts = append(m.values, value), append(m.texts, part)
	}
	return nil
}

func (m *many[T]) String() string { return strings.Join(m.texts, ",") }
func (m *many[T]) Type() string   { return "value" }

// unbuilt is a flag of the manual whose behaviour is not there yet: refused, never ignored.
type unbuilt struct{ name string }

var _ pflag.Value = unbuilt{}

func bindUnbuilt(fs *pflag.FlagSet, names ...string) {
	for _, name := range names {
		flag := fs.VarPF(unbuilt{name: name}, name, "", "not built yet")
		flag.Hidden = true
		flag.NoOptDefVal = "true"
	}
}

func (u unbuilt) Set(string) error { return usagef("--%s: not built yet", u.name) }
func (u unbuilt) String() string   { return "" }
func (u unbuilt) Type() string     { return "value" }

// word makes a parse function for one of a few words.
func word[T any](flag string, choices map[string]T, order ...string) func(string) (T, error) {
	return func(text string) (T, error) {
		value, ok := choices[text]
		if !ok {
			return value, fmt.Errorf("--%s %s: takes %s", flag, text, strings.Join(order, ", "))
		}
		return value, nil
	}
}

// backquote marks the word that pflag prints as the value's name in the usage.
func backquote(word, usage string) string {
	return strings.Replace(usage, word, "`"+word+"`", 1)
}
