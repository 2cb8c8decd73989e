// Command citest runs 'go test -json' with the arguments it is given, prints
// what a person wants to read of it, and fails where go test does and also when
// a test was skipped or none ran: what a skip hides is not tested.
//
// The last line is 'N passed, N failed, N skipped', tests and subtests counted
// each by itself.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"time"
)

// An event is one line of 'go test -json' (go doc cmd/test2json; go help
// buildjson for those without a package).
type event struct {
	Action     string
	Package    string
	ImportPath string // of build-output and build-fail
	Test       string
	Output     string
	Elapsed    float64 // seconds
}

// slowTest is the time from which on a test is named in the output.
const slowTest = 20 * time.Second

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

func run(args []string, stdout, stderr io.Writer) int {
	cmd := exec.Command("go", append([]string{"test", "-json", "-count=1"}, args...)...)
	cmd.Stderr = stderr
	events, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		fmt.Fprintln(stderr, "citest:", err)
		return 1
	}
	sum := newSummary(stdout)
	readErr := sum.read(events)
	waitErr := cmd.Wait()
	ok := sum.close()
	if readErr != nil {
		fmt.Fprintln(stderr, "citest:", readErr)
	}
	if waitErr != nil || readErr != nil || !ok {
		return 1
	}
	return 0
}

// testID names a test, or with an empty name its package.
type testID struct{ pkg, test string }

// A summary collects the events of one go test run.
type summary struct {
	out     io.Writer
	output  map[testID][]string // what running tests have printed
	failed  []testID
	skipped []testID
	passedN int
	failedN int // with packages that failed outside a test
}

func newSummary(out io.Writer) *summary {
	return &summary{out: out, output: make(map[testID][]string)}
}

// read takes events to the end of r. A line that is none is printed as it is.
func (s *summary) read(r io.Reader) error {
	lines := bufio.NewReader(r)
	for {
		line, err := lines.ReadString('\n')
		if line != "" {
			var ev event
			if json.Unmarshal([]byte(line), &ev) == nil && ev.Action != "" {
				s.add(ev)
			} else {
				fmt.Fprint(s.out, line)
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (s *summary) add(ev event) {
	id := testID{ev.Package, ev.Test}
	switch ev.Action {
	case "output":
		s.output[id] = append(s.output[id], ev.Output)
	case "build-output":
		fmt.Fprint(s.out, ev.Output)
	case "pass", "fail", "skip":
		s.end(id, ev)
	}
}

// end is the end of a test, or of a package.
func (s *summary) end(id testID, ev event) {
	output := s.output[id]
	delete(s.output, id)
	elapsed := time.Duration(ev.Elapsed * float64(time.Second))
	if id.test == "" {
		s.endPackage(id, ev.Action, elapsed, output)
		return
	}
	switch ev.Action {
	case "pass":
		s.passedN++
		if elapsed >= slowTest && !strings.Contains(id.test, "/") {
			fmt.Fprintf(s.out, "     %s %s took %s\n", id.pkg, id.test, elapsed.Round(time.Second))
		}
		return
	case "fail":
		s.failedN++
		s.failed = append(s.failed, id)
	case "skip":
		s.skipped = append(s.skipped, id)
	}
	fmt.Fprintf(s.out, "%s %s %s\n", strings.ToUpper(ev.Action), id.pkg, id.test)
	s.print(output)
}

func (s *summary) endPackage(id testID, action string, elapsed time.Duration, output []string) {
	switch action {
	case "pass":
		fmt.Fprintf(s.out, "ok   %s %s\n", id.pkg, elapsed.Round(10*time.Millisecond))
		return
	case "skip": // a package without test files is no skipped test
		return
	}
	// The tests that were running when the package died have not ended.
	inTest := false
	for other, lines := range s.output {
		if other.pkg == id.pkg && other.test != "" {
			fmt.Fprintf(s.out, "FAIL %s %s (did not end)\n", other.pkg, other.test)
			s.print(lines)
			s.failed, s.failedN, inTest = append(s.failed, other), s.failedN+1, true
			delete(s.output, other)
		}
	}
	for _, failed := range s.failed {
		inTest = inTest || failed.pkg == id.pkg
	}
	if !inTest { // it does not build, or TestMain failed
		s.failed, s.failedN = append(s.failed, id), s.failedN+1
	}
	fmt.Fprintf(s.out, "FAIL %s %s\n", id.pkg, elapsed.Round(10*time.Millisecond))
	s.print(output)
}

func (s *summary) print(lines []string) {
	for _, line := range lines {
		fmt.Fprint(s.out, line)
	}
}

// close prints the result and reports whether it is good.
func (s *summary) close() bool {
	for _, id := range s.failed {
		fmt.Fprintf(s.out, "failed:  %s %s\n", id.pkg, id.test)
	}
	for _, id := range s.skipped {
		fmt.Fprintf(s.out, "skipped: %s %s (a skipped test fails the run)\n", id.pkg, id.test)
	}
	fmt.Fprintf(s.out, "%d passed, %d failed, %d skipped\n", s.passedN, s.failedN, len(s.skipped))
	return s.passedN > 0 && s.failedN == 0 && len(s.skipped) == 0
}
