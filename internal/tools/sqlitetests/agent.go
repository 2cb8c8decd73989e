package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// An agent is the program with its mount, run by the ordinary user without a hub.
type agent struct {
	program string
	mount   string
	logFile string
	config  string
	socket  string
	cmd     *exec.Cmd
	ended   chan struct{} // closed when cmd has ended
	err     error         // how it ended
}

const patience = 30 * time.Second

func startAgent(program string) (*agent, error) {
	program, err := filepath.Abs(program)
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(workDir, "agent")
	a := &agent{
		mount: filepath.Join(dir, "root"), logFile: filepath.Join(workDir, "out", "agent.log"),
		config: filepath.Join(dir, "config.toml"), socket: filepath.Join(dir, "sock"),
		program: filepath.Join(dir, "litefs-agent"), ended: make(chan struct{}),
	}
	config := fmt.Sprintf("[node]\nid = \"sqlite\"\ndata = %q\n[mount]\ndir = %q\nmethod = \"fusermount\"\n[status]\nsocket = %q\n",
		filepath.Join(dir, "data"), a.mount, a.socket)
	binary, err := os.ReadFile(program)
	if err == nil {
		err = errors.Join(os.WriteFile(a.program, binary, 0o755), os.WriteFile(a.config, []byte(config), 0o644))
	}
	if err == nil {
		err = asUser(exec.Command("mkdir", a.mount), dir).Run()
	}
	if err != nil {
		return nil, err
	}
	log, err := os.Create(a.logFile)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	a.cmd = asUser(exec.Command(a.program, "mount", "--config", a.config), dir)
	a.cmd.Stdout, a.cmd.Stderr = log, log
	if err := a.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		a.err = a.cmd.Wait()
		close(a.ended)
	}()
	for deadline := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		text, err := os.ReadFile(a.logFile)
		switch {
		case err != nil:
			return nil, err
		case bytes.Contains(text, []byte("msg=mounted")):
			return a, nil
		case !a.running() || time.Now().After(deadline):
			return nil, errors.Join(fmt.Errorf("the agent does not serve:\n%s", text), a.stop())
		}
	}
}

func (a *agent) running() bool {
	select {
	case <-a.ended:
		return false
	default:
		return true
	}
}

// verify has the agent recompute every checksum.
func (a *agent) verify() error {
	out, err := asUser(exec.Command(a.program, "--socket", a.socket, "verify"), "/").CombinedOutput()
	if err != nil {
		return fmt.Errorf("verify: %w\n%s", err, out)
	}
	return nil
}

// stop is SIGTERM, which must end the agent with status 0.
func (a *agent) stop() error {
	if a.running() {
		a.cmd.Process.Signal(syscall.SIGTERM)
	}
	select {
	case <-a.ended:
	case <-time.After(patience):
		a.cmd.Process.Kill()
		<-a.ended
		return fmt.Errorf("the agent still runs %s after SIGTERM", patience)
	}
	if a.err != nil {
		return fmt.Errorf("the agent ended: %w", a.err)
	}
	return nil
}

// problems are the errors in the agent's log.
func (a *agent) problems() (problems []string) {
	text, err := os.ReadFile(a.logFile)
	if err != nil {
		return []string{err.Error()}
	}
	for line := range strings.Lines(string(text)) {
		if !strings.Contains(line, "level=INFO") && !strings.Contains(line, "level=WARN") {
			problems = append(problems, "log of the agent: "+strings.TrimSpace(line))
		}
	}
	return problems
}
