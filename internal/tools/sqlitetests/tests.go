package main

import (
	"fmt"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// tclTests are the files of SQLite's TCL tests that have to do with files, locks,
// journals, the WAL and crashes.
const tclTests = `
	lock lock2 lock3 lock4 journal1 journal2 journal3 jrnlmode jrnlmode2 jrnlmode3
	wal wal2 wal3 wal4 wal5 wal6 wal7 wal8 wal9 walmode walro walbak walcksum walhook walpersist walthread
	walcrash walcrash2 walcrash3 wal64k crash crash2 crash3 crash6 crash8
	savepoint pager1 pager2 vacuum vacuum2 incrvacuum exclusive exclusive2 sharedlock superlock busy busy2
	backup2 backup4 mmap1 mmap2 io syscall tempdb attach shrink delete_db hook rollback rollback2 stmt corrupt`

// longTests run only where they are named, since each takes ten minutes and more.
const longTests = "walslow pagerfault backup"

// mptests are the scripts of mptest, in which several processes share one database.
const mptests = "multiwrite01 crash01 config01"

var journalModes = []string{"delete", "truncate", "persist", "wal"}

// A test is one run of testfixture or mptester.
type test struct {
	name string // tcl/FILE, mptest/SCRIPT/MODE
	argv []string
}

func (t test) isTCL() bool { return strings.HasPrefix(t.name, "tcl/") }

// choose returns the tests that match one of patterns, separated by commas; all
// but the long ones if there are none.
func choose(patterns string) (chosen []test, err error) {
	for _, t := range allTests() {
		for pattern := range strings.SplitSeq(patterns, ",") {
			if ok, err := path.Match(pattern, t.name); err != nil {
				return nil, fmt.Errorf("%s: %w", pattern, err)
			} else if ok || patterns == "" && !slices.Contains(strings.Fields(longTests), path.Base(t.name)) {
				chosen = append(chosen, t)
				break
			}
		}
	}
	if len(chosen) == 0 {
		return nil, fmt.Errorf("no test is called %s", patterns)
	}
	return chosen, nil
}

func allTests() (tests []test) {
	for script := range strings.FieldsSeq(mptests) {
		for _, mode := range journalModes {
			if script == "config01" && mode == "wal" {
				continue // its clients leave WAL at their start, which SQLite refuses to those that come late
			}
			tests = append(tests, test{
				name: path.Join("mptest", script, mode),
				argv: []string{filepath.Join(sourceDir, "mptester"), "mp.db", "--journalmode", mode, filepath.Join(sourceDir, "mptest", script+".test")},
			})
		}
	}
	for file := range strings.FieldsSeq(tclTests + " " + longTests) {
		tests = append(tests, test{
			name: path.Join("tcl", file),
			argv: []string{filepath.Join(sourceDir, "testfixture"), filepath.Join(sourceDir, "test", file+".test")},
		})
	}
	return tests
}
