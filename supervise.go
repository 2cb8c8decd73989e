package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The exit statuses of 'mount -- CMD' besides CMD's own.
const (
	exitOurs       = 125 // the service failed
	exitNotRunable = 126 // CMD cannot be executed
	exitNotFound   = 127 // CMD does not exist
	exitSignal     = 128 // plus the number of the signal that ended CMD
)

// passedOn are the signals that CMD gets when the service does. Job control
// (SIGTSTP, SIGTTIN, SIGTTOU) stays with the terminal.
var passedOn = []os.Signal{
	syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT,
	syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGWINCH, syscall.SIGCONT,
}

// killAfter is how long CMD has to end after SIGTERM when the service has failed.
const killAfter = 10 * time.Second

// A supervisor runs a program beside the service:
//
//	waiting ──ready──► running ──CMD ends──► its status
//	   │                  │
//	   │                  └─service ends─► SIGTERM, then SIGKILL ─► 125
//	   └─signal, ctx or service ends─► never started: 128+N or 125
type supervisor struct {
	argv    []string
	ready   <-chan struct{}  // closed when the program may start
	ended   <-chan error     // the service's end, sent once
	signals <-chan os.Signal // to be passed on
	log     *slog.Logger

	stdin          io.Reader
	stdout, stderr io.Writer
	killAfter      time.Duration // 0: killAfter

	serviceEnded bool // set by run: ended was received
}

// run returns when the program has ended: its exit status, and the error that
// explains a status that is not the program's own. ctx ends the program with
// SIGTERM.
func (s *supervisor) run(ctx context.Context) (int, error) {
	if status, err := s.wait(ctx); status != exitDone || err != nil {
		return status, err
	}
	cmd := exec.Command(s.argv[0], s.argv[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = s.stdin, s.stdout, s.stderr
	cmd.WaitDelay = time.Second // a grandchild may hold the output open
	// The program does not outlive a service that is killed.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}

	started, done := make(chan error), make(chan error, 1)
	go func() {
		runtime.LockOSThread() // Pdeathsig looks at the thread that forked
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			done <- cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		return startStatus(err), err
	}
	return s.watch(ctx, cmd, done)
}

// wait returns 0 once the program may start.
func (s *supervisor) wait(ctx context.Context) (int, error) {
	for {
		select {
		case <-s.ready:
			return exitDone, nil
		case err := <-s.ended:
			s.serviceEnded = true
			return exitOurs, err
		case sig := <-s.signals:
			if sig == syscall.SIGTERM || sig == syscall.SIGINT || sig == syscall.SIGHUP || sig == syscall.SIGQUIT {
				return exitSignal + int(sig.(syscall.Signal)), nil
			}
		case <-ctx.Done():
			return exitOurs, context.Cause(ctx)
		}
	}
}

// watch passes signals to the running program until it ends.
func (s *supervisor) watch(ctx context.Context, cmd *exec.Cmd, done <-chan error) (int, error) {
	atTerminal := s.sharesTerminal()
	ctxDone, ended := ctx.Done(), s.ended
	var serviceErr error
	var kill <-chan time.Time
	for {
		select {
		case err := <-done:
			if s.serviceEnded {
				return exitOurs, serviceErr
			}
			return endStatus(cmd.ProcessState, err)
		case sig := <-s.signals:
			// The terminal has sent these to the whole process group, CMD included.
			if atTerminal && (sig == syscall.SIGINT || sig == syscall.SIGQUIT || sig == syscall.SIGWINCH) {
				continue
			}
			s.signal(cmd, sig)
		case <-ctxDone:
			ctxDone = nil
			s.signal(cmd, syscall.SIGTERM)
		case serviceErr = <-ended:
			ended, s.serviceEnded = nil, true
			if serviceErr == nil {
				serviceErr = errors.New("the service ended before its program")
			}
			after := s.killAfter
			if after == 0 {
				after = killAfter
			}
			kill = time.After(after)
			s.signal(cmd, syscall.SIGTERM)
		case <-kill:
			s.signal(cmd, syscall.SIGKILL)
		}
	}
}

func (s *supervisor) signal(cmd *exec.Cmd, sig os.Signal) {
	if err := cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		s.log.Warn("signal not passed on", "signal", sig.String(), "err", err)
	}
}

// sharesTerminal reports whether standard input is a terminal, whose keys then
// reach CMD without us.
func (s *supervisor) sharesTerminal() bool {
	file, ok := s.stdin.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(file.Fd()), unix.TCGETS)
	return err == nil
}

// startStatus is the status of a program that could not be started.
func startStatus(err error) int {
	switch {
	case errors.Is(err, exec.ErrNotFound), errors.Is(err, os.ErrNotExist):
		return exitNotFound
	case errors.Is(err, os.ErrPermission), errors.Is(err, syscall.ENOEXEC), errors.Is(err, syscall.EISDIR), errors.Is(err, exec.ErrDot):
		return exitNotRunable
	}
	return exitOurs
}

// endStatus is the status of a program that has ended; err is that of its Wait.
func endStatus(state *os.ProcessState, err error) (int, error) {
	if state == nil {
		return exitOurs, fmt.Errorf("wait for the program: %w", err)
	}
	if wait := state.Sys().(syscall.WaitStatus); wait.Signaled() {
		return exitSignal + int(wait.Signal()), nil
	}
	return state.ExitCode(), nil
}
