package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// A trace is what strace saw of a process: what it read from /dev/fuse, by the
// operation code in the first bytes, and the system calls that flush, by file.
type trace struct {
	requests map[string]int
	flushes  map[string]int
}

// traced runs fn while strace watches the threads of a process.
func traced(ctx context.Context, pid int, work string, fn func() error) (t trace, err error) {
	file := filepath.Join(work, "strace.out")
	cmd := exec.Command("strace", "-f", "-y", "-xx", "-s", "8", "-o", file,
		"-e", "trace=read,fsync,fdatasync,sync_file_range,syncfs,sync,msync", "-p", strconv.Itoa(pid))
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	stderr, err := cmd.StderrPipe()
	if err != nil {
		return t, err
	}
	if err := cmd.Start(); err != nil {
		return t, err
	}
	attached := make(chan bool, 1)
	go func() {
		sc := bufio.NewScanner(stderr)
		for sc.Scan() {
			if strings.Contains(sc.Text(), "attached") {
				select {
				case attached <- true:
				default:
				}
			}
		}
		close(attached)
		_, _ = io.Copy(io.Discard, stderr)
	}()
	ok := false
	select {
	case ok = <-attached:
	case <-time.After(10 * time.Second):
	case <-ctx.Done():
	}
	if ok {
		err = fn()
		time.Sleep(50 * time.Millisecond) // the kernel sends RELEASE and FORGET late
	} else {
		err = fmt.Errorf("strace could not attach to process %d", pid)
	}
	_ = cmd.Process.Signal(syscall.SIGINT)
	_ = cmd.Wait() // strace ends by the signal
	if err != nil {
		return t, err
	}
	f, err := os.Open(file)
	if err != nil {
		return t, err
	}
	defer f.Close()
	return parseTrace(f)
}

var (
	traceLine = regexp.MustCompile(`^(\d+) +(?:<\.\.\. )?(\w+)(?:\((?:\d+<([^>]*)>)?| resumed>)(.*)$`)
	traceData = regexp.MustCompile(`"((?:\\x[0-9a-f]{2})+)"`)
	traceHex  = regexp.MustCompile(`\\x[0-9a-f]{2}`)
)

// parseTrace reads strace's output. A call that others interrupt has two lines:
//
//	12 read(7</dev/fuse>,  <unfinished ...>
//	12 <... read resumed>"\x38...", 135168) = 56
func parseTrace(r io.Reader) (trace, error) {
	t := trace{requests: map[string]int{}, flushes: map[string]int{}}
	open := map[string]string{} // file of the unfinished call, by thread
	sc := bufio.NewScanner(r)
	for sc.Scan() {
		m := traceLine.FindStringSubmatch(sc.Text())
		if m == nil {
			continue
		}
		thread, call, file, rest := m[1], m[2], unhex(m[3]), m[4]
		if strings.HasSuffix(rest, "<unfinished ...>") {
			open[thread] = file
			continue
		}
		if strings.Contains(sc.Text(), "resumed>") {
			file = open[thread]
		}
		eq := strings.LastIndex(rest, " = ")
		if eq < 0 || strings.HasPrefix(rest[eq+3:], "-") || strings.HasPrefix(rest[eq+3:], "?") {
			continue
		}
		if call != "read" {
			t.flushes[file]++
			continue
		}
		data := traceData.FindStringSubmatch(rest)
		if file != "/dev/fuse" || data == nil {
			continue
		}
		if b := unhex(data[1]); len(b) >= 8 {
			t.requests[opName(int(b[4])|int(b[5])<<8)]++
		}
	}
	return t, sc.Err()
}

func unhex(s string) string {
	return traceHex.ReplaceAllStringFunc(s, func(x string) string {
		n, _ := strconv.ParseUint(x[2:], 16, 8)
		return string([]byte{byte(n)})
	})
}

// opName names the kernel's operation codes. Source: include/uapi/linux/fuse.h.
func opName(op int) string {
	names := map[int]string{
		1: "LOOKUP", 2: "FORGET", 3: "GETATTR", 4: "SETATTR", 10: "UNLINK", 14: "OPEN", 15: "READ", 16: "WRITE",
		17: "STATFS", 18: "RELEASE", 20: "FSYNC", 22: "GETXATTR", 25: "FLUSH", 31: "GETLK", 32: "SETLK", 33: "SETLKW",
		34: "ACCESS", 35: "CREATE", 36: "INTERRUPT", 39: "IOCTL", 42: "BATCH_FORGET", 43: "FALLOCATE",
	}
	if name := names[op]; name != "" {
		return name
	}
	return fmt.Sprintf("OP%d", op)
}
