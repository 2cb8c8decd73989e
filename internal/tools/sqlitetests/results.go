package main

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// results of one side, by the name of the test.
type results map[string]result

// A result is what became of one test, case by case. Of a name that several
// cases of a file share, one failure is the name's.
type result struct {
	cases map[string]bool // reached; true: passed
	fault string          // not empty: the test did not come to its end, and why
	said  map[string]string
}

var (
	caseLine    = regexp.MustCompile(`^([^\s.!][^\s]*?)\.\.\.(.*)$`)
	failLine    = regexp.MustCompile(`^! (\S+) expected: (.*)$`)
	tclSummary  = regexp.MustCompile(`^(\d+) errors out of (\d+) tests`)
	failedNames = regexp.MustCompile(`^!Failures on these tests:(.*)$`)
	mpSummary   = regexp.MustCompile(`^Summary: (\d+) errors out of (\d+) tests`)
)

// parse reads what a test has printed; err is how its process ended.
func parse(t test, output string, err error) result {
	res := result{cases: map[string]bool{}, said: map[string]string{}}
	summary := mpSummary
	if t.isTCL() {
		summary = tclSummary
	}
	var ended, failed bool
	last := ""
	for line := range strings.Lines(output) {
		line = strings.TrimRight(line, "\n")
		if m := summary.FindStringSubmatch(line); m != nil {
			ended, failed = true, m[1] != "0"
		} else if m := failedNames.FindStringSubmatch(line); m != nil {
			for name := range strings.FieldsSeq(m[1]) {
				res.cases[name] = false
			}
		} else if !t.isTCL() {
			continue
		} else if m := failLine.FindStringSubmatch(line); m != nil {
			res.cases[m[1]] = false
			last = m[1]
			res.said[last] += line + "\n"
		} else if strings.HasPrefix(line, "! "+last+" ") || strings.HasPrefix(line, "Error:") {
			res.said[last] += line + "\n"
		} else if m := caseLine.FindStringSubmatch(line); m != nil && m[2] != " Omitted" {
			last = m[1]
			if _, seen := res.cases[last]; !seen {
				res.cases[last] = true
			}
		}
	}
	if !t.isTCL() {
		res.cases["errors"] = ended && !failed
	}
	switch {
	case err != nil && !(ended && failed): // exit status 1 says that cases failed
		res.fault = err.Error()
	case !ended:
		res.fault = "no summary"
	case len(res.cases) == 0:
		res.fault = "ran no case"
	case failed && res.passedN() == len(res.cases):
		res.fault = "errors without names"
	}
	if res.fault != "" {
		res.fault += ", after " + last
		res.said[""] = tail(output, 12)
	}
	return res
}

func (r result) passedN() (n int) {
	for _, passed := range r.cases {
		if passed {
			n++
		}
	}
	return n
}

func (r result) summary() string {
	text := fmt.Sprintf("%d of %d pass", r.passedN(), len(r.cases))
	if r.fault != "" {
		text += "; stopped: " + r.fault
	}
	return text
}

func (r results) passedN() (n int) {
	for _, res := range r {
		n += res.passedN()
	}
	return n
}

// list is the text of a list of results: a line for each test, and one for each
// of its cases that does not pass.
func (r results) list() string {
	var text strings.Builder
	for _, name := range slices.Sorted(maps.Keys(r)) {
		res := r[name]
		switch {
		case res.fault != "":
			fmt.Fprintf(&text, "%s stopped\n", name)
		case res.passedN() == len(res.cases):
			fmt.Fprintf(&text, "%s pass\n", name)
		default:
			fmt.Fprintf(&text, "%s fail\n", name)
		}
		for _, c := range slices.Sorted(maps.Keys(res.cases)) {
			if !res.cases[c] {
				fmt.Fprintf(&text, "%s fail\n", path.Join(name, c))
			}
		}
	}
	return text.String()
}

// compareList compares results with what a committed list says of these tests, or
// with update writes it there.
func compareList(file string, got results, update bool) (problems []string, err error) {
	old, err := os.ReadFile(file)
	if err != nil && !(update && errors.Is(err, os.ErrNotExist)) {
		return nil, err
	}
	have := lines(got.list())
	want, others := got.split(lines(string(old)))
	if update {
		all := append(others, have...)
		slices.Sort(all)
		return nil, os.WriteFile(file, []byte(strings.Join(all, "\n")+"\n"), 0o644)
	}
	for _, d := range []struct {
		from, in []string
		says     string
	}{{have, want, "new"}, {want, have, "gone"}} {
		for _, line := range d.from {
			if !slices.Contains(d.in, line) {
				problems = append(problems, fmt.Sprintf("%s: %s: %s", filepath.Base(file), d.says, line))
			}
		}
	}
	return problems, nil
}

func lines(text string) []string {
	return slices.DeleteFunc(strings.Split(text, "\n"), func(line string) bool { return line == "" })
}

// split returns the lines of a list that speak of these tests, and the others.
func (r results) split(list []string) (ours, others []string) {
	for _, line := range list {
		name, _, _ := strings.Cut(line, " ")
		_, there := r[name]
		for !there && strings.Contains(name, "/") {
			name = path.Dir(name)
			_, there = r[name]
		}
		if there {
			ours = append(ours, line)
		} else {
			others = append(others, line)
		}
	}
	return ours, others
}

func tail(text string, n int) string {
	lines := strings.Split(strings.TrimRight(text, "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
