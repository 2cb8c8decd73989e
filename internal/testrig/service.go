package testrig

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// A Service is a node or a hub: the built program in a process of its own. It
// can be killed and started again any number of times.
type Service struct {
	ID    string
	Dir   string // of everything below
	Mount string // empty for a hub without
	Data  string
	Args  []string // further arguments of the program, for the next Start

	env     *Env
	verb    string // mount, hub
	config  string // the file
	socket  string
	logFile string
	user    bool // runs as User
	cmd     *exec.Cmd
	ended   chan struct{} // closed when cmd has ended
	err     error         // how it ended
}

// Options of a node or hub.
type Options struct {
	ID     string // default "n1", "hub"
	Config string // TOML, after the sections that the rig writes: [node], [mount], [status]
	HTTP   string // hub: lines of [http] beside listen
	Node   string // node: further lines of [node]
	NoID   bool   // without an id in the configuration
	User   bool   // runs as the ordinary user
	Mount  bool   // hub: with a mount; a node always has one
	Method string // of mounting
	Data   string // the data folder; default one of the rig's
}

// Node starts a node and returns when it is mounted.
func (env *Env) Node(opts Options) *Service {
	env.Helper()
	s := env.NewNode(opts)
	s.Start()
	return s
}

// NewNode prepares a node; Start starts it.
func (env *Env) NewNode(opts Options) *Service {
	env.Helper()
	if opts.ID == "" {
		opts.ID = "n1"
	}
	return env.service("mount", opts)
}

// NewHub prepares a hub that listens at addr; Start starts it.
func (env *Env) NewHub(addr string, opts Options) *Service {
	env.Helper()
	if opts.ID == "" {
		opts.ID = "hub"
	}
	opts.Config += fmt.Sprintf("\n[http]\nlisten = %q\n%s\n", addr, opts.HTTP)
	return env.service("hub", opts)
}

func (env *Env) service(verb string, opts Options) *Service {
	env.Helper()
	dir := env.Folder(opts.ID)
	s := &Service{
		ID: opts.ID, Dir: dir, Data: filepath.Join(dir, "data"),
		env: env, verb: verb, config: filepath.Join(dir, "config.toml"), socket: filepath.Join(dir, "sock"),
		logFile: filepath.Join(dir, "log"), user: opts.User,
	}
	if opts.Data != "" {
		s.Data = opts.Data
	}
	section := "node"
	if verb == "hub" {
		section = "hub"
	}
	var text strings.Builder
	id := fmt.Sprintf("id = %q\n", s.ID)
	if opts.NoID {
		id = ""
	}
	if verb == "mount" {
		id += opts.Node
	}
	fmt.Fprintf(&text, "[%s]\n%sdata = %q\n\n[status]\nsocket = %q\n", section, id, s.Data, s.socket)
	if verb == "mount" || opts.Mount {
		s.Mount = filepath.Join(dir, "mnt")
		if opts.Method == "" {
			opts.Method = "auto"
		}
		fmt.Fprintf(&text, "\n[mount]\ndir = %q\nmethod = %q\n", s.Mount, opts.Method)
		if err := os.Mkdir(s.Mount, 0o755); err != nil {
			env.Fatal(err)
		}
		if opts.User {
			if err := os.Chown(s.Mount, User, User); err != nil {
				env.Fatal(err)
			}
		}
	}
	text.WriteString("\n" + opts.Config)
	if err := os.WriteFile(s.config, []byte(text.String()), 0o644); err != nil {
		env.Fatal(err)
	}
	env.mu.Lock()
	defer env.mu.Unlock()
	env.services = append(env.services, s)
	return s
}

// startTime is how long a service may take to start, recovery included.
const startTime = 30 * time.Second

// Start starts the service and returns when it serves.
func (s *Service) Start() {
	s.env.Helper()
	if s.Running() {
		s.env.Fatalf("%s already runs", s.ID)
	}
	log, err := os.OpenFile(s.logFile, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o666)
	if err != nil {
		s.env.Fatal(err)
	}
	defer log.Close()
	at, err := log.Seek(0, 2)
	if err != nil {
		s.env.Fatal(err)
	}
	cmd := s.env.Command(s.env.Program, append([]string{s.verb, "--config", s.config}, s.Args...)...)
	if s.user {
		AsUser(cmd)
	}
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		s.env.Fatal(err)
	}
	ended := make(chan struct{})
	s.cmd, s.ended, s.err = cmd, ended, nil
	go func() {
		s.err = cmd.Wait()
		close(ended)
	}()
	for deadline := time.Now().Add(startTime); !s.serves(at); time.Sleep(3 * time.Millisecond) {
		if !s.Running() {
			s.env.Fatalf("%s ended at its start: %v\n%s", s.ID, s.err, tail(s.logFile, 20))
		}
		if time.Now().After(deadline) {
			s.env.Fatalf("%s does not serve after %v\n%s", s.ID, startTime, tail(s.logFile, 20))
		}
	}
}

// serves reports whether the life whose log begins at offset at is mounted.
func (s *Service) serves(at int64) bool {
	if s.Mount == "" {
		return exec.Command(s.env.Program, "--socket", s.socket, "status").Run() == nil
	}
	log, err := os.ReadFile(s.logFile)
	return err == nil && bytes.Contains(log[at:], []byte("msg=mounted"))
}

// Running reports whether the process is there.
func (s *Service) Running() bool {
	if s.cmd == nil {
		return false
	}
	select {
	case <-s.ended:
		return false
	default:
		return true
	}
}

// Pid of the running process.
func (s *Service) Pid() int { return s.cmd.Process.Pid }

// Kill is kill -9; it returns when the process is gone, not its watcher.
func (s *Service) Kill() {
	s.env.Helper()
	s.cmd.Process.Kill()
	s.await("kill -9")
}

// Stop is SIGTERM: the service must end with status 0 and leave no mount.
func (s *Service) Stop() {
	s.env.Helper()
	if !s.Running() {
		return
	}
	s.cmd.Process.Signal(syscall.SIGTERM)
	s.await("SIGTERM")
	if s.err != nil {
		s.env.Errorf("%s ended by SIGTERM: got %v, want exit status 0\n%s", s.ID, s.err, tail(s.logFile, 20))
	}
	if slices.Contains(mountPoints(), s.Mount) {
		s.env.Errorf("%s: mounted after it has stopped", s.Mount)
	}
}

func (s *Service) await(signal string) {
	s.env.Helper()
	select {
	case <-s.ended:
	case <-time.After(stopTime):
		s.cmd.Process.Signal(syscall.SIGQUIT) // its goroutines, into the log
		time.Sleep(time.Second)
		s.cmd.Process.Kill()
		s.env.Fatalf("%s still runs %v after %s\n%s", s.ID, stopTime, signal, tail(s.logFile, 400))
	}
}

// Restart is Kill and Start.
func (s *Service) Restart() {
	s.env.Helper()
	s.Kill()
	s.Start()
}

// Config is the file of the configuration.
func (s *Service) Config() string { return s.config }

// Log returns what the service has logged in all its lives.
func (s *Service) Log() string {
	s.env.Helper()
	text, err := os.ReadFile(s.logFile)
	if err != nil {
		s.env.Fatal(err)
	}
	return string(text)
}

// Path returns the path of name at the mount.
func (s *Service) Path(name string) string { return filepath.Join(s.Mount, name) }

// Client prepares the program as a client of this service.
func (s *Service) Client(args ...string) *exec.Cmd {
	return s.env.Command(s.env.Program, append([]string{"--socket", s.socket}, args...)...)
}

// Verify has the service recompute the checksums of all databases and records.
func (s *Service) Verify() {
	s.env.Helper()
	if out, err := Output(s.Client("verify"), ""); err != nil {
		s.env.Errorf("verify at %s: %v\n%s", s.ID, err, out)
	}
}

// Status returns status --json.
func (s *Service) Status() map[string]any {
	s.env.Helper()
	out, err := Output(s.Client("status", "--json"), "")
	var state map[string]any
	if jsonErr := json.Unmarshal([]byte(out), &state); jsonErr != nil {
		s.env.Fatalf("status at %s: %v, %v\n%s", s.ID, err, jsonErr, out)
	}
	return state
}
