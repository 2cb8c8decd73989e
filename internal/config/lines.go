package config

import (
	"fmt"
	"strings"
)

// lineIndex maps dotted keys, as in Fault.Key, to the line that sets them.
type lineIndex map[string]int

// of returns the line of key, or of the nearest table above it, or 0.
func (l lineIndex) of(key string) int {
	for key != "" {
		if line, ok := l[key]; ok {
			return line
		}
		key = key[:max(strings.LastIndexAny(key, ".["), 0)]
	}
	return 0
}

// keyLines finds the keys of a TOML text that a TOML parser has accepted. What
// it does not understand it skips: a fault then has the line of its table.
func keyLines(text string) lineIndex {
	s := lineScanner{text: text, line: 1, index: make(lineIndex), tables: make(map[string]int)}
	for s.pos < len(s.text) {
		s.statement()
	}
	return s.index
}

type lineScanner struct {
	text   string
	pos    int
	line   int
	table  string         // key of the last header, with the number of an array's table
	tables map[string]int // tables seen of each array of tables
	index  lineIndex
	spans  map[string]span // of the values and headers; nil where nobody asks
}

// A span is a part of the text, without comments and spaces around it.
type span struct{ from, to int }

func (s *lineScanner) found(key string, from, to int) {
	if s.spans != nil {
		s.spans[key] = span{from, to}
	}
}

// next takes one byte.
func (s *lineScanner) next() byte {
	c := s.text[s.pos]
	s.pos++
	if c == '\n' {
		s.line++
	}
	return c
}

func (s *lineScanner) statement() {
	switch c := s.text[s.pos]; {
	case strings.IndexByte(" \t\r\n", c) >= 0:
		s.next()
	case c == '#':
		s.toLineEnd()
	case c == '[':
		s.header()
	default:
		s.assignment()
	}
}

func (s *lineScanner) toLineEnd() {
	for s.pos < len(s.text) && s.text[s.pos] != '\n' {
		s.next()
	}
}

// header reads [a.b] or [[a.b]].
func (s *lineScanner) header() {
	array := strings.HasPrefix(s.text[s.pos:], "[[")
	line := s.line
	for s.pos < len(s.text) && s.text[s.pos] == '[' {
		s.next()
	}
	from := s.pos
	key := s.key("]")
	s.toLineEnd()
	end := s.pos
	if array {
		s.tables[key]++
		s.index[key] = max(s.index[key], line)
		key = fmt.Sprintf("%s[%d]", key, s.tables[key])
	}
	s.table = key
	s.index[key] = line
	s.found(key, from, end)
}

// assignment reads KEY = VALUE.
func (s *lineScanner) assignment() {
	line := s.line
	key := s.key("=\n")
	if s.table != "" {
		key = s.table + "." + key
	}
	s.index[key] = line
	if s.pos < len(s.text) && s.text[s.pos] == '=' {
		s.next()
		for s.pos < len(s.text) && strings.IndexByte(" \t", s.text[s.pos]) >= 0 {
			s.next()
		}
		from := s.pos
		s.found(key, from, s.value())
	}
}

// key reads a dotted key up to one of the bytes in end, without quotes and spaces.
func (s *lineScanner) key(end string) string {
	var key strings.Builder
	for s.pos < len(s.text) && !strings.ContainsRune(end, rune(s.text[s.pos])) {
		switch c := s.next(); c {
		case ' ', '\t', '\r':
		case '"', '\'':
			for s.pos < len(s.text) && s.text[s.pos] != c {
				key.WriteByte(s.next())
			}
			if s.pos < len(s.text) {
				s.next()
			}
		default:
			key.WriteByte(c)
		}
	}
	return key.String()
}

// value skips a value: to the end of the line, but over strings, lists and
// inline tables of several lines. It returns where the value itself ends.
func (s *lineScanner) value() (end int) {
	depth := 0
	end = s.pos
	for s.pos < len(s.text) {
		switch c := s.text[s.pos]; c {
		case '"', '\'':
			s.quoted(c)
			end = s.pos
			continue
		case '#':
			s.toLineEnd()
			continue
		case '[', '{':
			depth++
		case ']', '}':
			depth--
		case '\n':
			if depth <= 0 {
				return end
			}
		}
		if strings.IndexByte(" \t\r\n", s.next()) < 0 {
			end = s.pos
		}
	}
	return end
}

// quoted skips a string in any of the four forms.
func (s *lineScanner) quoted(quote byte) {
	end := string(quote)
	if triple := strings.Repeat(end, 3); strings.HasPrefix(s.text[s.pos:], triple) {
		end = triple
	}
	s.pos += len(end)
	for s.pos < len(s.text) && !strings.HasPrefix(s.text[s.pos:], end) {
		if s.next() == '\\' && quote == '"' && s.pos < len(s.text) {
			s.next()
		}
	}
	s.pos = min(s.pos+len(end), len(s.text))
}
