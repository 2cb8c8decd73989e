package main

import (
	"fmt"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
)

const differencesFile = "differences.txt"

// differences are the cases that may pass on the disk and not at the mount. In
// the file each reason is one or more lines of text, then come the patterns of its
// cases (path.Match), indented by a tab. '?' before a pattern: it depends on the
// moment, and may also pass. Lines that begin with '#' are comments.
type differences []*difference

type difference struct {
	pattern  string
	reason   string
	mayPass  bool
	matchedN int
}

func readDifferences(file string) (differences, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	return parseDifferences(string(text))
}

func parseDifferences(text string) (all differences, err error) {
	var reason []string
	inPatterns := false
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, " \n")
		pattern, indented := strings.CutPrefix(line, "\t")
		switch {
		case line == "", strings.HasPrefix(line, "#"):
		case !indented:
			if inPatterns {
				reason = nil
			}
			inPatterns = false
			reason = append(reason, line)
		case len(reason) == 0:
			return nil, fmt.Errorf("%s: %q has no reason", differencesFile, pattern)
		default:
			inPatterns = true
			d := &difference{reason: strings.Join(reason, " ")}
			d.pattern, d.mayPass = strings.CutPrefix(pattern, "?")
			if _, err := path.Match(d.pattern, ""); err != nil {
				return nil, fmt.Errorf("%s: %s: %w", differencesFile, d.pattern, err)
			}
			all = append(all, d)
		}
	}
	return all, nil
}

// explained marks the entry that name falls under.
func (all differences) explained(name string) bool {
	for _, d := range all {
		if ok, _ := path.Match(d.pattern, name); ok {
			d.matchedN++
			return true
		}
	}
	return false
}

// unexplained returns the cases that pass on the disk, but not at the mount, and
// for which there is no reason.
func (all differences) unexplained(disk, mount results) (problems []string) {
	for _, name := range slices.Sorted(maps.Keys(disk)) {
		d, m := disk[name], mount[name]
		if d.fault != "" {
			problems = append(problems, fmt.Sprintf("%s stops on ext4 already: %s\n%s", name, d.fault, indent(d.said[""])))
		}
		if m.fault != "" && !all.explained(path.Join(name, "stopped")) {
			problems = append(problems, fmt.Sprintf("%s stops at the mount: %s\n%s", name, m.fault, indent(m.said[""])))
		}
		for _, c := range slices.Sorted(maps.Keys(d.cases)) {
			passed, reached := m.cases[c]
			if !d.cases[c] || passed || all.explained(path.Join(name, c)) {
				continue
			}
			what := "is not reached at the mount"
			if reached {
				what = "fails at the mount"
			}
			problems = append(problems, strings.TrimRight(fmt.Sprintf("%s %s\n%s", path.Join(name, c), what, indent(m.said[c])), " \n"))
		}
		for _, c := range slices.Sorted(maps.Keys(m.cases)) {
			if _, reached := d.cases[c]; !reached && !m.cases[c] && !all.explained(path.Join(name, c)) {
				problems = append(problems, fmt.Sprintf("%s fails at the mount, and is not reached on ext4\n%s", path.Join(name, c), indent(m.said[c])))
			}
		}
	}
	return problems
}

// unused returns the entries under which no case falls any more.
func (all differences) unused() (problems []string) {
	for _, d := range all {
		if d.matchedN == 0 && !d.mayPass {
			problems = append(problems, fmt.Sprintf("%s: no difference any more: %s", differencesFile, d.pattern))
		}
	}
	return problems
}

// usedN is the number of differences with a reason.
func (all differences) usedN() (n int) {
	for _, d := range all {
		n += d.matchedN
	}
	return n
}
