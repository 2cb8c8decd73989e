package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A supervised is a supervisor at work in a test.
type supervised struct {
	supervisor
	ready   chan struct{}
	ended   chan error
	signals chan os.Signal
	output  *bufio.Reader // what the program prints
	stop    context.CancelFunc
	result  chan supervisedResult
}

type supervisedResult struct {
	status int
	err    error
}

func startSupervised(t *testing.T, isReady bool, argv ...string) *supervised {
	t.Helper()
	ready, ended, signals := make(chan struct{}), make(chan error, 1), make(chan os.Signal, 16)
	read, write := io.Pipe()
	ctx, stop := context.WithCancel(context.Background())
	s := &supervised{
		supervisor: supervisor{argv: argv, ready: ready, ended: ended, signals: signals, log: slog.New(slog.DiscardHandler),
			stdin: strings.NewReader("input\n"), stdout: write, stderr: write, killAfter: 100 * time.Millisecond},
		ready: ready, ended: ended, signals: signals, output: bufio.NewReader(read), stop: stop, result: make(chan supervisedResult, 1),
	}
	if isReady {
		close(ready)
	}
	go func() {
		status, err := s.supervisor.run(ctx)
		write.Close()
		s.result <- supervisedResult{status, err}
	}()
	t.Cleanup(func() {
		read.Close() // a program that still writes must not block
		stop()
	})
	return s
}

// line waits for the program to print a line.
func (s *supervised) line(t *testing.T, want string) {
	t.Helper()
	if got, err := s.output.ReadString('\n'); strings.TrimSpace(got) != want {
		t.Fatalf("got %q, %v, want %q", got, err, want)
	}
}

// end waits for the end, and wants the status and an error or none.
func (s *supervised) end(t *testing.T, status int, wantErr bool) {
	t.Helper()
	go io.Copy(io.Discard, s.output)
	select {
	case got := <-s.result:
		if got.status != status || (got.err != nil) != wantErr {
			t.Errorf("got %d, %v; want %d, error: %v", got.status, got.err, status, wantErr)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("did not end")
	}
}

func TestSuperviseStatus(t *testing.T) {
	dir := t.TempDir()
	plain := filepath.Join(dir, "plain") // not executable
	broken := filepath.Join(dir, "broken")
	if err := os.WriteFile(plain, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(broken, []byte("\x7fELF no program"), 0o755); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name    string
		argv    []string
		status  int
		wantErr bool
	}{
		{"done", []string{"true"}, 0, false},
		{"failed", []string{"sh", "-c", "exit 3"}, 3, false},
		{"killed", []string{"sh", "-c", "kill -9 $$"}, 128 + 9, false},
		{"reads our input", []string{"sh", "-c", "read x; test $x = input"}, 0, false},
		{"not found", []string{"no-such-program"}, 127, true},
		{"no such path", []string{dir + "/none"}, 127, true},
		{"not executable", []string{plain}, 126, true},
		{"no program", []string{broken}, 126, true},
		{"a folder", []string{dir}, 126, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			startSupervised(t, true, tt.argv...).end(t, tt.status, tt.wantErr)
		})
	}
}

func TestSuperviseStartsWhenReady(t *testing.T) {
	s := startSupervised(t, false, "echo", "started")
	select {
	case got := <-s.result:
		t.Fatalf("ended before ready: %+v", got)
	case <-time.After(50 * time.Millisecond):
	}
	close(s.ready)
	s.line(t, "started")
	s.end(t, 0, false)
}

func TestSupervisePassesSignals(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGUSR1} {
		t.Run(sig.String(), func(t *testing.T) {
			s := startSupervised(t, true, "sh", "-c", `trap "echo got; exit 7" TERM INT HUP USR1; echo up; while :; do sleep 0.01; done`)
			s.line(t, "up")
			s.signals <- sig
			s.line(t, "got")
			s.end(t, 7, false)
		})
	}
	t.Run("that ends it", func(t *testing.T) {
		s := startSupervised(t, true, "sh", "-c", "echo up; exec sleep 60")
		s.line(t, "up")
		s.signals <- syscall.SIGTERM
		s.end(t, 128+15, false)
	})
}

func TestSuperviseSignalBeforeReady(t *testing.T) {
	s := startSupervised(t, false, "touch", filepath.Join(t.TempDir(), "x"))
	s.signals <- syscall.SIGWINCH // is no reason to stop
	s.signals <- syscall.SIGTERM
	s.end(t, 128+15, false)
	if exists(s.argv[1]) {
		t.Error("the program was started")
	}
}

func TestSuperviseServiceEnds(t *testing.T) {
	t.Run("before ready", func(t *testing.T) {
		s := startSupervised(t, false, "true")
		s.ended <- errors.New("no mount")
		s.end(t, 125, true)
	})
	t.Run("under a program that stops", func(t *testing.T) {
		s := startSupervised(t, true, "sh", "-c", `trap "exit 0" TERM; echo up; while :; do sleep 0.01; done`)
		s.line(t, "up")
		s.ended <- errors.New("no mount")
		s.end(t, 125, true)
	})
	t.Run("under a program that does not", func(t *testing.T) {
		s := startSupervised(t, true, "sh", "-c", `trap "" TERM; echo up; while :; do sleep 0.01; done`)
		s.line(t, "up")
		s.ended <- nil
		s.end(t, 125, true)
	})
}

func TestSuperviseContextEnds(t *testing.T) {
	s := startSupervised(t, true, "sh", "-c", "echo up; exec sleep 60")
	s.line(t, "up")
	s.stop()
	s.end(t, 128+15, false)
}

// A program that ends while a child of its own holds the output open does not
// hold the service.
func TestSuperviseOrphan(t *testing.T) {
	var out bytes.Buffer
	ready := make(chan struct{})
	close(ready)
	s := supervisor{argv: []string{"sh", "-c", "sleep 5 & echo $!; exit 4"}, ready: ready, log: slog.New(slog.DiscardHandler), stdout: &out}
	begin := time.Now()
	status, err := s.run(context.Background())
	if status != 4 || err != nil || time.Since(begin) > 4*time.Second {
		t.Errorf("got %d, %v after %v", status, err, time.Since(begin))
	}
}
