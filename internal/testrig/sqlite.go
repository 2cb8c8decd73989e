package testrig

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"
)

// SQL runs a script by a sqlite3 process on database db and returns stdout and
// stderr in one. The first error ends it and fails the test.
func (env *Env) SQL(db, script string) string {
	env.Helper()
	out, err := env.TrySQL(db, script)
	if err != nil {
		env.Fatalf("sqlite3 %s: %v\n%s\nscript:\n%s", db, err, out, short(script))
	}
	return out
}

// TrySQL is SQL for a script that may fail.
func (env *Env) TrySQL(db, script string) (string, error) {
	return Output(env.Command("sqlite3", "-batch", "-bail", db), ".timeout 20000\n"+script+"\n")
}

func short(s string) string {
	if len(s) > 2000 {
		return s[:1000] + "\n...\n" + s[len(s)-1000:]
	}
	return s
}

// A Session is a sqlite3 process that a test talks to step by step.
type Session struct {
	env   *Env
	cmd   *exec.Cmd
	stdin io.WriteCloser
	out   *bufio.Reader
	pipe  *os.File
	n     int
	ended bool
}

// Session starts sqlite3 on database db, with further arguments.
func (env *Env) Session(db string, args ...string) *Session {
	env.Helper()
	return env.SessionOf(env.Command("sqlite3", append(append([]string{"-batch"}, args...), db)...))
}

// SessionOf is Session for a prepared command.
func (env *Env) SessionOf(cmd *exec.Cmd) *Session {
	env.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		env.Fatal(err)
	}
	defer w.Close()
	s := &Session{env: env, cmd: cmd, out: bufio.NewReader(r), pipe: r}
	cmd.Stdout, cmd.Stderr = w, w
	if s.stdin, err = cmd.StdinPipe(); err != nil {
		env.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		env.Fatal(err)
	}
	env.Cleanup(s.Kill)
	return s
}

// Try runs SQL or dot commands and returns what they print, errors included.
// ok is false where the process has ended.
func (s *Session) Try(sql string) (out string, ok bool) {
	s.n++
	mark := fmt.Sprintf("--done-%d--", s.n)
	timer := time.AfterFunc(runTime, s.kill)
	defer timer.Stop()
	if _, err := io.WriteString(s.stdin, sql+"\n.print "+mark+"\n"); err != nil {
		return "", false
	}
	var text strings.Builder
	for {
		line, err := s.out.ReadString('\n')
		if err != nil {
			return text.String() + line, false
		}
		if before, found := strings.CutSuffix(line, mark+"\n"); found {
			text.WriteString(before)
			return strings.TrimRight(text.String(), "\n"), true
		}
		text.WriteString(line)
	}
}

// Do is Try for what must not fail.
func (s *Session) Do(sql string) string {
	s.env.Helper()
	out, ok := s.Try(sql)
	if !ok {
		s.env.Fatalf("sqlite3 ended\n%s\nin: %s", out, short(sql))
	}
	if IsError(out) {
		s.env.Fatalf("sqlite3: %s\nin: %s", out, short(sql))
	}
	return out
}

// IsError reports whether sqlite3 wrote an error.
func IsError(out string) bool {
	for line := range strings.Lines(out) {
		for _, prefix := range []string{"Runtime error", "Parse error", "Error:"} {
			if strings.HasPrefix(line, prefix) {
				return true
			}
		}
	}
	return false
}

// Pid of the process.
func (s *Session) Pid() int { return s.cmd.Process.Pid }

// Signal sends to the process what is not to end it.
func (s *Session) Signal(sig os.Signal) { s.cmd.Process.Signal(sig) }

// Close ends the process as .quit does and waits for it.
func (s *Session) Close() {
	s.env.Helper()
	if s.ended {
		return
	}
	timer := time.AfterFunc(runTime, s.kill)
	defer timer.Stop()
	s.stdin.Close()
	rest, _ := io.ReadAll(s.out)
	if err := s.wait(); err != nil && !strings.HasPrefix(err.Error(), "exit status") {
		s.env.Errorf("sqlite3 at its end: %v\n%s", err, bytes.TrimSpace(rest))
	}
}

// Kill is kill -9.
func (s *Session) Kill() {
	if !s.ended {
		s.kill()
		s.stdin.Close()
		s.wait()
	}
}

func (s *Session) kill() { s.cmd.Process.Kill() }

func (s *Session) wait() error {
	s.ended = true
	defer s.pipe.Close()
	return s.cmd.Wait()
}

// Pos is what NAME-pos says of the database at path.
func (env *Env) Pos(path string) Pos {
	env.Helper()
	b, err := os.ReadFile(path + "-pos")
	if err != nil {
		env.Fatal(err)
	}
	pos, err := ParsePos(string(b))
	if err != nil {
		env.Fatalf("%s-pos: %v", path, err)
	}
	return pos
}

// A Pos is a position as the computed files print it.
type Pos struct{ TXID, Checksum uint64 }

func (p Pos) String() string { return fmt.Sprintf("%016x/%016x", p.TXID, p.Checksum) }

// ParsePos reads the text of a computed file, newline included.
func ParsePos(text string) (p Pos, err error) {
	txid, sum, _ := strings.Cut(strings.TrimSuffix(text, "\n"), "/")
	if p.TXID, err = strconv.ParseUint(txid, 16, 64); err == nil {
		p.Checksum, err = strconv.ParseUint(sum, 16, 64)
	}
	if err == nil && p.String()+"\n" != text {
		err = fmt.Errorf("%q is not 16 hex digits, a slash, 16 hex digits, newline", text)
	}
	return p, err
}
