// Command sabotage switches off, one at a time, the rules that keep data safe, and
// runs the test that must notice. It prints a table of rule, invariant, seed and
// what failed first, and fails where nothing did.
//
// The tests are built once, with the tag "sabotage"; the environment says which
// rule a run goes without. Before all, every test runs with all rules in force.
package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"text/tabwriter"
	"time"
)

const variable = "LITEFS_AGENT_SABOTAGE"

// limit is how long one test may take to notice.
const limit = 5 * time.Minute

func main() {
	dir := flag.String("dir", ".build/sabotage", "folder of the test binaries")
	only := flag.String("rule", "", "only this rule")
	flag.Parse()
	os.Exit(run(*dir, *only, os.Stdout, os.Stderr))
}

func run(dir, only string, stdout, stderr io.Writer) int {
	if err := build(dir); err != nil {
		fmt.Fprintln(stderr, "sabotage:", err)
		return 1
	}
	start := time.Now()
	ok := true
	if only == "" {
		ok = soundTests(dir, stderr)
	}
	var list []result
	for _, r := range rules {
		if only == "" || only == string(r.rule) {
			list = append(list, result{rule: r})
		}
	}
	each(len(list), func(i int) {
		began := time.Now()
		list[i].try(dir)
		fmt.Fprintf(stderr, "%s: caught=%v in %s\n", list[i].rule.rule, list[i].caught, time.Since(began).Round(time.Second))
	})
	w := tabwriter.NewWriter(stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "rule switched off\tinvariant\tcaught by\tseed\tfirst failing step")
	missed := 0
	for _, r := range list {
		if !r.caught {
			missed++
			r.step = "NOTHING FAILED: " + r.step
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", r.rule.rule, r.rule.invariant, r.rule.by.run, r.seed, r.step)
	}
	_ = w.Flush()
	fmt.Fprintf(stdout, "%d rules, %d not noticed, in %s\n", len(list), missed, time.Since(start).Round(time.Second))
	if missed > 0 || !ok || len(list) == 0 {
		return 1
	}
	return 0
}

// build makes the test binaries.
func build(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for name, pkg := range packages {
		cmd := exec.Command("go", "test", "-c", "-tags", "sabotage", "-o", filepath.Join(dir, name+".test"), "./"+pkg)
		cmd.Stderr = os.Stderr
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("build the tests of %s: %w", pkg, err)
		}
	}
	return nil
}

// soundTests runs every test that is going to be used with all rules in force.
func soundTests(dir string, stderr io.Writer) bool {
	var mu sync.Mutex // guards ok
	ok := true
	var all []test
	for _, r := range rules {
		known := false
		for _, t := range all {
			known = known || t.run == r.by.run && t.pkg == r.by.pkg
		}
		if !known {
			all = append(all, r.by)
		}
	}
	each(len(all), func(i int) {
		if out, err := all[i].do(dir, ""); err != nil {
			mu.Lock()
			defer mu.Unlock()
			ok = false
			fmt.Fprintf(stderr, "sabotage: %s fails with every rule in force: %v\n%s\n", all[i].run, err, tail(out))
		}
	})
	return ok
}

// each calls fn for 0 to n-1, as many at a time as there are processors.
func each(n int, fn func(i int)) {
	next := make(chan int)
	var wg sync.WaitGroup
	for range runtime.NumCPU() {
		wg.Go(func() {
			for i := range next {
				fn(i)
			}
		})
	}
	for i := range n {
		next <- i
	}
	close(next)
	wg.Wait()
}

// A test is one run of a test binary.
type test struct {
	pkg  string // key of packages
	run  string // for -test.run
	args []string
}

func (t test) do(dir, rule string) (out []byte, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	binary, err := filepath.Abs(filepath.Join(dir, t.pkg+".test"))
	if err != nil {
		return nil, err
	}
	args := append([]string{"-test.run", "^" + t.run + "$", "-test.timeout", "0", "-test.failfast"}, t.args...)
	cmd := exec.CommandContext(ctx, binary, args...)
	cmd.Dir = packages[t.pkg]
	cmd.Env = append(os.Environ(), variable+"="+rule, "GOMAXPROCS=1")
	cmd.WaitDelay = time.Second
	var b bytes.Buffer
	cmd.Stdout, cmd.Stderr = &b, &b
	err = cmd.Run()
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	return b.Bytes(), err
}

// A result is what a test made of a missing rule.
type result struct {
	rule   rule
	caught bool
	seed   string
	step   string
}

var (
	failure = regexp.MustCompile(`(?m)^\s+\w+_test\.go:\d+: (.*)$`)
	seeded  = regexp.MustCompile(`^seed (\d+) \([^)]*\): `)
	crashed = regexp.MustCompile(`(?m)^(panic: .*|fatal error: .*)$`)
)

func (r *result) try(dir string) {
	out, err := r.rule.by.do(dir, string(r.rule.rule))
	if err == nil {
		r.step = "the test passes"
		return
	}
	if ctxErr := context.DeadlineExceeded; err == ctxErr {
		r.step = "the test hangs"
		return
	}
	m := failure.FindSubmatch(out)
	if m == nil {
		m = crashed.FindSubmatch(out)
	}
	if r.caught = m != nil; r.caught {
		r.step = string(m[1])
	} else {
		r.step = err.Error() + ": " + tail(out)
	}
	if s := seeded.FindStringSubmatch(r.step); s != nil {
		r.seed, r.step = s[1], r.step[len(s[0]):]
	}
	if len(r.step) > 150 {
		r.step = r.step[:150] + "…"
	}
}

func tail(out []byte) string {
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	return strings.Join(lines[max(0, len(lines)-5):], "\n")
}
