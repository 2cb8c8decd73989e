package config

import (
	"errors"
	"fmt"
	"os"
)

// A Format reads and writes TOML; the two config.go fill it in.
type Format struct {
	// Decode parses text. An error comes with its line, 0 if unknown.
	Decode  func(text string) (tree map[string]any, line int, err error)
	Marshal func(value any) ([]byte, error)
}

// Values are the values of one file, a pointer to a struct with toml tags.
type Values interface {
	// Faults returns everything that is wrong with them.
	Faults() []Fault
}

// ReadFile reads file over the defaults in values. With file "" it reads
// standard, which need not exist. The error of a bad file names all its faults:
// a [*Faults]. After an error values are of no use.
func (f Format) ReadFile(file, standard string, env LookupEnv, values Values) error {
	name := file
	if name == "" {
		name = standard
	}
	text, err := os.ReadFile(name)
	if file == "" && errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	return f.Parse(name, string(text), env, values)
}

// Parse is ReadFile for a text; file names it in errors.
func (f Format) Parse(file, text string, env LookupEnv, values Values) error {
	tree, line, err := f.Decode(text)
	if err != nil {
		return &Faults{File: file, List: []Fault{{Line: line, Text: err.Error()}}}
	}
	return load(file, text, tree, env, values)
}

// Tree returns values as maps, lists, strings and the like, for JSON.
func (f Format) Tree(values any) (map[string]any, error) {
	text, err := f.Marshal(values)
	if err != nil {
		return nil, err
	}
	tree, _, err := f.Decode(string(text))
	return tree, err
}
