package main

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

var errExit = errors.New("exit status 1")

func TestParse(t *testing.T) {
	tcl, mp := test{name: "tcl/x"}, test{name: "mptest/x/wal"}
	for _, tc := range []struct {
		name   string
		test   test
		output string
		err    error
		cases  map[string]bool
		fault  string
	}{
		{"all pass", tcl, "x-1.1... Ok\nx-1.2...\nsaid meanwhile\nx-2... Omitted\n0 errors out of 3 tests on vm Linux\n", nil,
			map[string]bool{"x-1.1": true, "x-1.2": true}, ""},
		{"one of two of a name fails", tcl, "x-1... Ok\nx-1...\n! x-1 expected: [1]\n! x-1 got:      [2]\nx-1... Ok\n1 errors out of 3 tests\n!Failures on these tests: x-1\n",
			errExit, map[string]bool{"x-1": false}, ""},
		{"an error of a script is a failure", tcl, "x-1...\nError: no such table: t\n1 errors out of 2 tests\n!Failures on these tests: x-1\n", errExit,
			map[string]bool{"x-1": false}, ""},
		{"stopped", tcl, "x-1... Ok\n/bin/testfixture: no such file\n", errExit, map[string]bool{"x-1": true}, "exit status 1, after x-1"},
		{"killed at its end", tcl, "x-1... Ok\n0 errors out of 1 tests\n", errors.New("signal: killed"), map[string]bool{"x-1": true}, "signal: killed, after x-1"},
		{"no case", tcl, "0 errors out of 0 tests\n", nil, map[string]bool{}, "ran no case, after "},
		{"mptest", mp, "Summary: 0 errors out of 9 tests\n", nil, map[string]bool{"errors": true}, ""},
		{"mptest fails", mp, "x... Ok\nSummary: 2 errors out of 9 tests\n", errExit, map[string]bool{"errors": false}, ""},
		{"mptest dies", mp, "", errExit, map[string]bool{"errors": false}, "exit status 1, after "},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := parse(tc.test, tc.output, tc.err)
			if !reflect.DeepEqual(got.cases, tc.cases) || got.fault != tc.fault {
				t.Errorf("got %v %q, want %v %q", got.cases, got.fault, tc.cases, tc.fault)
			}
		})
	}
}

func TestDifferences(t *testing.T) {
	if _, err := parseDifferences("\ttcl/x/*\n"); err == nil {
		t.Error("a pattern without a reason was accepted")
	}
	all, err := parseDifferences("# comment\nrefused by\ndesign\n\ttcl/x/a*\n\t?tcl/x/b\nno difference\n\ttcl/x/gone\n")
	if err != nil {
		t.Fatal(err)
	}
	if got, want := all[0].reason, "refused by design"; got != want {
		t.Errorf("reason: got %q, want %q", got, want)
	}
	ran := func(cases map[string]bool) results { return results{"tcl/x": {cases: cases}} }
	disk := ran(map[string]bool{"a1": true, "a2": true, "c": true, "d": false, "e": true})
	mount := ran(map[string]bool{"a1": false, "a2": true, "d": false, "e": true, "f": false})
	got := strings.Join(all.unexplained(disk, mount), "\n")
	for _, want := range []string{"tcl/x/c is not reached at the mount", "tcl/x/f fails at the mount, and is not reached on ext4"} {
		if !strings.Contains(got, want) {
			t.Errorf("got %q, want %q in it", got, want)
		}
	}
	for _, unwanted := range []string{"tcl/x/a", "tcl/x/d", "tcl/x/e"} {
		if strings.Contains(got, unwanted) {
			t.Errorf("got %q, do not want %s in it", got, unwanted)
		}
	}
	if got := all.unused(); len(got) != 1 || !strings.Contains(got[0], "tcl/x/gone") {
		t.Errorf("unused: got %q, want tcl/x/gone alone", got)
	}
	if all.usedN() != 1 {
		t.Errorf("used: got %d, want 1", all.usedN())
	}
}

func TestList(t *testing.T) {
	file := filepath.Join(t.TempDir(), "list")
	first := results{"tcl/a": {cases: map[string]bool{"1": true}}, "tcl/b": {cases: map[string]bool{"1": true, "2": false}}, "tcl/c": {fault: "killed"}}
	if _, err := compareList(file, first, true); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(file)
	if want := "tcl/a pass\ntcl/b fail\ntcl/b/2 fail\ntcl/c stopped\n"; err != nil || string(text) != want {
		t.Errorf("got %q (%v), want %q", text, err, want)
	}
	if p, err := compareList(file, first, false); len(p) > 0 || err != nil {
		t.Errorf("the same again: got %q, %v", p, err)
	}
	other := results{"tcl/b2": {cases: map[string]bool{"1": true}}}
	if _, err := compareList(file, other, true); err != nil {
		t.Fatal(err)
	}
	if p, err := compareList(file, first, false); len(p) > 0 || err != nil {
		t.Errorf("after another test came in: got %q, %v", p, err)
	}
	first["tcl/b"].cases["1"] = false
	if p, _ := compareList(file, first, false); len(p) != 1 || !strings.Contains(p[0], "new: tcl/b/1 fail") {
		t.Errorf("one more failure: got %q", p)
	}
}

// Every test file that the committed lists name is one that is run, and the other
// way round; the file of differences can be read.
func TestCommittedLists(t *testing.T) {
	lists := filepath.Join("..", "..", "..", "sqlitetests")
	if all, err := readDifferences(filepath.Join(lists, differencesFile)); err != nil || len(all) == 0 {
		t.Errorf("%d differences, %v", len(all), err)
	}
	chosen, err := choose("")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"ext4.txt", "mount.txt"} {
		text, err := os.ReadFile(filepath.Join(lists, name))
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range chosen {
			if !strings.Contains("\n"+string(text), "\n"+c.name+" ") {
				t.Errorf("%s does not say how %s ends", name, c.name)
			}
		}
	}
}
