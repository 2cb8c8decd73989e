package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// nobody is the user that the worker runs as.
const nobody = 65534

// A worker is the process that uses SQLite; see work.go.
type worker struct {
	cmd     *exec.Cmd
	in      io.Closer
	enc     *json.Encoder
	dec     *json.Decoder
	sqlite  string // its version
	pending error
}

func startWorker() (*worker, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(self, "work")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		// The mount belongs to the agent's group.
		Credential: &syscall.Credential{Uid: nobody, Gid: nobody, Groups: []uint32{uint32(os.Getgid())}}, Pdeathsig: syscall.SIGKILL, Setpgid: true,
	}
	cmd.Dir, cmd.Stderr = "/", os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the worker as user %d (may it reach the program?): %w", nobody, err)
	}
	w := &worker{cmd: cmd, in: in, enc: json.NewEncoder(in), dec: json.NewDecoder(bufio.NewReader(out))}
	version, err := w.do(request{Do: "version"})
	w.sqlite = version.Text
	return w, err
}

func (w *worker) do(r request) (reply, error) {
	var got reply
	if err := w.enc.Encode(r); err != nil {
		return got, fmt.Errorf("worker: %w", err)
	}
	if err := w.dec.Decode(&got); err != nil {
		return got, fmt.Errorf("worker: %w", err)
	}
	if got.Err != "" {
		return got, errors.New(got.Err)
	}
	return got, nil
}

func (w *worker) close() {
	w.in.Close()
	_ = w.cmd.Wait()
}

// A mounted is a running agent.
type mounted struct {
	cmd   *exec.Cmd
	dir   string        // the mount
	data  string        // the data folder
	ready time.Duration // from start to the first answer of the mount
}

// startAgent mounts data at work/mount. extra is more configuration.
func startAgent(ctx context.Context, binary, work, data, extra string) (*mounted, error) {
	m := &mounted{dir: filepath.Join(work, "mount"), data: data}
	if err := os.MkdirAll(m.dir, 0o755); err != nil && !errors.Is(err, unix.ENOTCONN) && !errors.Is(err, os.ErrExist) {
		return nil, err
	}
	config := fmt.Sprintf("[node]\nid = \"bench\"\ndata = %q\n[mount]\ndir = %q\nmethod = \"direct\"\n[status]\nsocket = %q\n%s",
		data, m.dir, filepath.Join(work, "agent.sock"), extra)
	file := filepath.Join(work, "config.toml")
	if err := os.WriteFile(file, []byte(config), 0o644); err != nil {
		return nil, err
	}
	log, err := os.OpenFile(filepath.Join(work, "agent.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	m.cmd = exec.Command(binary, "mount", "--config", file)
	m.cmd.Stdout, m.cmd.Stderr = log, log
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	start := time.Now()
	if err := m.cmd.Start(); err != nil {
		return nil, err
	}
	err = until(ctx, 2*time.Minute, "mount", func() bool {
		var st unix.Statfs_t
		return unix.Statfs(m.dir, &st) == nil && st.Type == unix.FUSE_SUPER_MAGIC
	})
	m.ready = time.Since(start)
	if err != nil {
		m.kill()
		tail, _ := os.ReadFile(log.Name())
		return nil, fmt.Errorf("%w; the agent's log ends:\n%s", err, tail[max(0, len(tail)-2000):])
	}
	return m, nil
}

func (m *mounted) pid() int { return m.cmd.Process.Pid }

// stop ends the agent the clean way and returns how long that took.
func (m *mounted) stop() (time.Duration, error) {
	start := time.Now()
	_ = m.cmd.Process.Signal(syscall.SIGTERM)
	// Then its log says where each goroutine is.
	timer := time.AfterFunc(20*time.Second, func() { _ = m.cmd.Process.Signal(syscall.SIGQUIT) })
	err := m.cmd.Wait()
	timer.Stop()
	took := time.Since(start)
	unmount(m.dir)
	if err != nil {
		return took, fmt.Errorf("the agent stopped: %w", err)
	}
	return took, nil
}

// kill ends it with SIGKILL and leaves the mount as that leaves it.
func (m *mounted) kill() {
	_ = m.cmd.Process.Kill()
	_ = m.cmd.Wait()
}

// cpu is the processor time of a process, dead threads included. Its clock counts
// nanoseconds, where /proc counts ticks. Source: MAKE_PROCESS_CPUCLOCK in the
// kernel's include/linux/posix-timers_types.h.
func cpu(pid int) time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(^int32(pid)<<3|2, &ts); err != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}

// memory is what a process holds, in bytes.
type memory struct{ anon, file, memfd int64 }

func (m memory) total() int64 { return m.anon + m.file + m.memfd }

// String is in MB: anonymous + file-backed + memfd.
func (m memory) String() string {
	return fmt.Sprintf("%.1f = %.1f + %.1f + %.1f", mb(m.total()), mb(m.anon), mb(m.file), mb(m.memfd))
}

func mb(n int64) float64 { return float64(n) / 1e6 }

func memoryOf(pid int) (m memory) {
	proc := "/proc/" + strconv.Itoa(pid)
	status := fields(proc + "/status")
	m.anon, m.file = status["RssAnon"]*1024, status["RssFile"]*1024
	// Pages of a memfd that are mapped are RssShmem too: counted once, as blocks.
	fds, _ := os.ReadDir(proc + "/fd")
	seen := map[uint64]bool{}
	for _, fd := range fds {
		path := filepath.Join(proc, "fd", fd.Name())
		var st unix.Stat_t
		target, err := os.Readlink(path)
		if err == nil && strings.HasPrefix(target, "/memfd:") && unix.Stat(path, &st) == nil && !seen[st.Ino] {
			seen[st.Ino] = true
			m.memfd += st.Blocks * 512
		}
	}
	return m
}

// fields are the numbers of a file such as /proc/PID/status.
func fields(path string) map[string]int64 {
	out := map[string]int64{}
	b, _ := os.ReadFile(path)
	for line := range strings.Lines(string(b)) {
		key, value, _ := strings.Cut(line, ":")
		if f := strings.Fields(value); len(f) > 0 {
			if n, err := strconv.ParseInt(f[0], 10, 64); err == nil {
				out[key] = n
			}
		}
	}
	return out
}

// peak samples the memory of a process until stop is called, which returns the
// largest sum seen.
func peak(pid int) (stop func() memory) {
	quit, done := make(chan struct{}), make(chan memory)
	go func() {
		var most memory
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for {
			if now := memoryOf(pid); now.total() > most.total() {
				most = now
			}
			select {
			case <-tick.C:
			case <-quit:
				done <- most
				return
			}
		}
	}()
	return func() memory { close(quit); return <-done }
}

// switches is the number of context switches of all threads of a process.
func switches(pid int) (n int64) {
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	for _, task := range tasks {
		f := fields(task)
		n += f["voluntary_ctxt_switches"] + f["nonvoluntary_ctxt_switches"]
	}
	return n
}

func dropCaches() error {
	unix.Sync()
	return os.WriteFile("/proc/sys/vm/drop_caches", []byte("3\n"), 0)
}
