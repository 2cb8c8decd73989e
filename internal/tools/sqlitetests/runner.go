package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

// A runner runs tests on both sides.
type runner struct {
	ctx     context.Context
	agent   *agent
	timeout time.Duration
	out     io.Writer // guarded by mu

	mu       sync.Mutex
	problems []string // guarded by mu; of the mount, beside what tests say
}

// A side is where a test runs.
type side struct {
	name string
	dir  string
	got  results // guarded by runner.mu
}

// runAll runs every test on both sides, some at a time.
func (r *runner) runAll(tests []test, jobs int) (disk, mount results) {
	sides := []*side{
		{name: "ext4", dir: filepath.Join(workDir, plainDir), got: results{}},
		{name: "mount", dir: r.agent.mount, got: results{}},
	}
	type job struct {
		side *side
		test test
	}
	queue := make(chan job)
	var workers sync.WaitGroup
	for range jobs {
		workers.Go(func() {
			for j := range queue {
				if r.ctx.Err() == nil {
					r.runOne(j.side, j.test)
				}
			}
		})
	}
	for _, t := range tests {
		for _, s := range sides {
			queue <- job{s, t}
		}
	}
	close(queue)
	workers.Wait()
	return sides[0].got, sides[1].got
}

// runOne runs one test in a new folder.
func (r *runner) runOne(s *side, t test) {
	flat := strings.ReplaceAll(t.name, "/", "-")
	dir := filepath.Join(s.dir, flat)
	start := time.Now()
	output, err := r.execute(t, dir)
	res := parse(t, output, err)
	took := time.Since(start)
	problem := os.WriteFile(filepath.Join(workDir, "out", flat+"."+s.name), []byte(output), 0o644)
	if s.name == "mount" {
		problem = errors.Join(problem, r.agent.verify())
	}
	problem = errors.Join(problem, removeAll(dir))

	r.mu.Lock()
	defer r.mu.Unlock()
	s.got[t.name] = res
	if problem != nil {
		r.problems = append(r.problems, fmt.Sprintf("%s on %s: %v", t.name, s.name, problem))
	}
	fmt.Fprintf(r.out, "%-5s %-28s %6.1fs  %s\n", s.name, t.name, took.Seconds(), res.summary())
}

// execute runs the test and returns what it prints. Processes that it leaves
// behind are killed.
func (r *runner) execute(t test, dir string) (string, error) {
	if out, err := asUser(exec.Command("mkdir", dir), "/").CombinedOutput(); err != nil {
		return string(out), err
	}
	ctx, cancel := context.WithTimeout(r.ctx, r.timeout)
	defer cancel()
	cmd := asUser(exec.CommandContext(ctx, t.argv[0], t.argv[1:]...), dir)
	killGroup := func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.Cancel, cmd.WaitDelay = killGroup, 5*time.Second
	out, err := cmd.CombinedOutput()
	if cmd.Process != nil {
		_ = killGroup() // mostly there is none
	}
	if ctx.Err() != nil {
		err = fmt.Errorf("ended after %s: %w", r.timeout, ctx.Err())
	}
	return string(out), err
}

// removeAll removes the folder, at the mount too, where removing a database
// removes names beside it that were listed before.
func removeAll(dir string) error {
	err := os.RemoveAll(dir)
	if _, statErr := os.Lstat(dir); errors.Is(statErr, fs.ErrNotExist) {
		return nil
	}
	return err
}
