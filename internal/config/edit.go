package config

import (
	"fmt"
	"regexp"
	"strings"
)

// A Setting is one key of a file and the text that it is to have.
type Setting struct {
	Table, Key string // such as "hub", "url"
	Value      string // as it is; Set quotes it
}

// Set returns a TOML text in which the settings hold and everything else is as it
// was, comments included. A key that is there gets its new value in place; else it
// is added below a comment that shows it, else at the begin of its table. text
// must be one that a TOML parser accepts.
func Set(text string, list ...Setting) (string, error) {
	for _, set := range list {
		var err error
		if text, err = setOne(text, set); err != nil {
			return "", err
		}
	}
	return text, nil
}

func setOne(text string, set Setting) (string, error) {
	value, err := quote(set.Value)
	if err != nil {
		return "", fmt.Errorf("%s.%s: %w", set.Table, set.Key, err)
	}
	s := lineScanner{text: text, line: 1, index: make(lineIndex), tables: make(map[string]int), spans: make(map[string]span)}
	for s.pos < len(s.text) {
		s.statement()
	}
	if at, ok := s.spans[set.Table+"."+set.Key]; ok {
		return text[:at.from] + value + text[at.to:], nil
	}
	line := set.Key + " = " + value + "\n"
	header, ok := s.spans[set.Table]
	if !ok {
		if text != "" && !strings.HasSuffix(text, "\n") {
			text += "\n"
		}
		if text != "" {
			text += "\n"
		}
		return text + "[" + set.Table + "]\n" + line, nil
	}
	if !strings.HasPrefix(strings.TrimSpace(text[strings.LastIndexByte(text[:header.from], '\n')+1:]), "[") {
		return "", fmt.Errorf("%s: is written as an inline table: write it as [%s] with a line for each key", set.Table, set.Table)
	}
	at := nextLine(text, header.to)
	if n := shownAt(text[at:], set.Key); n >= 0 {
		at += n
	}
	before := text[:at]
	if before != "" && !strings.HasSuffix(before, "\n") {
		before += "\n"
	}
	return before + line + text[at:], nil
}

// nextLine returns where the line after that of at begins.
func nextLine(text string, at int) int {
	if n := strings.IndexByte(text[at:], '\n'); n >= 0 {
		return at + n + 1
	}
	return len(text)
}

// shownAt finds the comment that shows a key in the rest of a table, and returns
// where the line after it begins, or -1.
func shownAt(text, key string) int {
	shown := regexp.MustCompile(`^#\s*` + regexp.QuoteMeta(key) + `\s*=`)
	for at := 0; at < len(text); at = nextLine(text, at) {
		line := text[at:nextLine(text, at)]
		if strings.HasPrefix(strings.TrimSpace(line), "[") {
			break
		}
		if shown.MatchString(line) {
			return nextLine(text, at)
		}
	}
	return -1
}

// quote makes a TOML string. "${" would be taken for a variable.
func quote(value string) (string, error) {
	for _, r := range value {
		if r < ' ' || r == 0x7f || r == '\ufffd' {
			return "", fmt.Errorf("%q: cannot be written into a configuration", value)
		}
	}
	if strings.Contains(value, "${") {
		return "", fmt.Errorf("%q: ${ stands for the environment in a configuration", value)
	}
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(value) + `"`, nil
}
