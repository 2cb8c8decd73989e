package config

import (
	"encoding"
	"fmt"
	"maps"
	"reflect"
	"regexp"
	"slices"
	"strings"
)

// A Fault is one thing wrong with a configuration.
type Fault struct {
	Key  string // dotted; tables of an array are counted from 1: "database[1].name"
	Line int    // 0 where the key is not in the file
	Text string // what is wrong and what to do
}

// Faults are all things wrong with one file. As an error it has a line for each.
type Faults struct {
	File string
	List []Fault
}

func (f *Faults) Error() string {
	var text strings.Builder
	for i, fault := range f.List {
		if i > 0 {
			text.WriteByte('\n')
		}
		text.WriteString(f.File)
		if fault.Line > 0 {
			fmt.Fprintf(&text, ":%d", fault.Line)
		}
		if fault.Key != "" {
			fmt.Fprintf(&text, ": %s", fault.Key)
		}
		fmt.Fprintf(&text, ": %s", fault.Text)
	}
	return text.String()
}

// LookupEnv is os.LookupEnv, or a test's own.
type LookupEnv func(name string) (value string, ok bool)

// load decodes tree, the content of file, over the defaults in values, then adds
// what values.Faults finds. It returns nil or a *Faults with the lines looked up
// in text, in the order of the file.
func load(file, text string, tree map[string]any, env LookupEnv, values Values) error {
	d := decoder{env: env}
	d.table("", tree, reflect.ValueOf(values).Elem())
	faults := d.faults
	for _, fault := range values.Faults() {
		// A value that could not be read has its default: one fault is enough.
		if !slices.ContainsFunc(d.faults, func(f Fault) bool { return f.Key == fault.Key }) {
			faults = append(faults, fault)
		}
	}
	if len(faults) == 0 {
		return nil
	}
	lines := keyLines(text)
	for i := range faults {
		faults[i].Line = lines.of(faults[i].Key)
	}
	slices.SortStableFunc(faults, func(a, b Fault) int { return a.Line - b.Line })
	return &Faults{File: file, List: faults}
}

type decoder struct {
	env    LookupEnv
	faults []Fault
}

func (d *decoder) fault(key, format string, args ...any) {
	d.faults = append(d.faults, Fault{Key: key, Text: fmt.Sprintf(format, args...)})
}

// table sets the fields of the struct dst from the keys of tree.
func (d *decoder) table(key string, tree map[string]any, dst reflect.Value) {
	fields := make(map[string]reflect.Value)
	for i := range dst.NumField() {
		if tag := dst.Type().Field(i).Tag.Get("toml"); tag != "" {
			fields[tag] = dst.Field(i)
		}
	}
	for name, value := range tree {
		full := name
		if key != "" {
			full = key + "." + name
		}
		if field, ok := fields[name]; ok {
			d.value(full, value, field)
		} else {
			d.fault(full, "unknown key%s", suggestion(name, fields))
		}
	}
}

// suggestion names the known key that a misspelt one most looks like.
func suggestion(name string, fields map[string]reflect.Value) string {
	plain := func(s string) string { return strings.ToLower(strings.NewReplacer("-", "", "_", "").Replace(s)) }
	for _, known := range slices.Sorted(maps.Keys(fields)) {
		if plain(known) == plain(name) || strings.HasPrefix(plain(known), plain(name)) || strings.HasPrefix(plain(name), plain(known)) {
			return fmt.Sprintf(": is %q meant?", known)
		}
	}
	return ": remove it"
}

// value sets dst, a field, from one value of the tree.
func (d *decoder) value(key string, value any, dst reflect.Value) {
	if text, ok := value.(string); ok {
		value = d.expand(key, text)
	}
	if unmarshaler, ok := dst.Addr().Interface().(encoding.TextUnmarshaler); ok {
		d.text(key, value, unmarshaler)
		return
	}
	switch dst.Kind() {
	case reflect.Struct:
		if tree, ok := value.(map[string]any); ok {
			d.table(key, tree, dst)
			return
		}
		d.fault(key, "must be a table: [%s]", key)
	case reflect.Slice:
		d.slice(key, value, dst)
	case reflect.String:
		if text, ok := value.(string); ok {
			dst.SetString(text)
			return
		}
		d.fault(key, "must be a string in quotes")
	case reflect.Bool:
		if b, ok := value.(bool); ok {
			dst.SetBool(b)
			return
		}
		d.fault(key, "must be true or false, without quotes")
	default:
		panic("config: field of a type that the decoder does not know: " + dst.Type().String())
	}
}

// text sets a value of one of the types of this package. A number is taken for
// its digits: rate = 0 is meant as "0".
func (d *decoder) text(key string, value any, dst encoding.TextUnmarshaler) {
	switch value := value.(type) {
	case string:
		if err := dst.UnmarshalText([]byte(value)); err != nil {
			d.fault(key, "%v", err)
		}
	case int64:
		if size, ok := dst.(*Size); ok && value >= 0 {
			*size = Size(value)
			return
		}
		d.fault(key, "%d: must be a string in quotes, with its unit", value)
	default:
		d.fault(key, "must be a string in quotes")
	}
}

// slice sets a list of values or an array of tables.
func (d *decoder) slice(key string, value any, dst reflect.Value) {
	if text, ok := value.(string); ok && dst.Type() == reflect.TypeFor[Strings]() {
		list := Strings{}
		if text != "" {
			list = Strings{text}
		}
		dst.Set(reflect.ValueOf(list))
		return
	}
	var items []any
	switch value := value.(type) {
	case []any:
		items = value
	case []map[string]any:
		for _, table := range value {
			items = append(items, table)
		}
	default:
		if dst.Type().Elem().Kind() == reflect.Struct {
			d.fault(key, "must be an array of tables: [[%s]]", key)
		} else {
			d.fault(key, "must be a list: [\"a\", \"b\"]")
		}
		return
	}
	list := reflect.MakeSlice(dst.Type(), len(items), len(items))
	for i, item := range items {
		element := list.Index(i)
		if defaults, ok := element.Addr().Interface().(interface{ SetDefaults() }); ok {
			defaults.SetDefaults()
		}
		d.value(fmt.Sprintf("%s[%d]", key, i+1), item, element)
	}
	dst.Set(list)
}

var envReference = regexp.MustCompile(`\$\{([^}]*)\}`)

// expand replaces each ${NAME} by the environment's value. A "$" that no "{"
// follows is itself.
func (d *decoder) expand(key, text string) string {
	return envReference.ReplaceAllStringFunc(text, func(reference string) string {
		name := reference[2 : len(reference)-1]
		value, ok := d.env(name)
		if !ok {
			d.fault(key, "${%s}: not set in the environment", name)
		}
		return value
	})
}
