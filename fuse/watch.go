package fuse

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/litefs-agent/litefs-agent/store"
)

// A program that lives on when the agent is killed holds a dead mount, and its
// page cache would go on answering: stale rows, or worse, a commit built on
// them that reaches the next mount by path. So a watcher, a process of its own,
// holds a copy of the connection's descriptor and a table of the nodes that the
// kernel knows. When the agent dies it aborts the connection, makes programs
// notice, detaches the mount, and only then lets go of the lock that the next
// agent waits for. Watch is its body; watched is the agent's side.

// The files that the agent hands to the watcher, as descriptors.
const (
	watchConn  = 3 + iota // copy of the connection
	watchTable            // memfd of node ids and kinds
	watchLife             // end of a pipe: closed when the agent dies, a byte when it unmounts by itself
	watchLock             // held while the watcher lives; may be /dev/null
)

// A slot of the table: node id (8 bytes, native order), kind + 1 (1 byte), 7
// unused. A zero id is a free slot.
const (
	slotSize  = 16
	slotCount = 1 << 16 // one MiB of address space; only what is used takes memory
)

// watched is the agent's side of its watcher.
type watched struct {
	argv  []string
	lock  *os.File
	log   *slog.Logger
	table *os.File
	mem   []byte // of table, shared with the watcher

	mu    sync.Mutex // guards all below
	slots map[uint64]int
	free  []int
	used  int
	conn  int
	dir   string
	how   string
	life  *os.File // our end of the pipe
	cmd   *exec.Cmd
	ended bool
}

// newWatched makes the table, before the first node is revealed.
func newWatched(argv []string, lock *os.File, log *slog.Logger) (*watched, error) {
	fd, err := unix.MemfdCreate("litefs-agent-nodes", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("watcher: %w", err)
	}
	w := &watched{argv: argv, lock: lock, log: log, table: os.NewFile(uintptr(fd), "nodes"), slots: make(map[uint64]int)}
	if err := unix.Ftruncate(fd, slotSize*slotCount); err != nil {
		return nil, fmt.Errorf("watcher: %w", err)
	}
	w.mem, err = unix.Mmap(fd, 0, slotSize*slotCount, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("watcher: %w", err)
	}
	return w, nil
}

// reveal enters a node before the reply that reveals it.
func (w *watched) reveal(id uint64, kind store.Kind) {
	switch kind {
	case store.KindDir, store.KindComputed, store.KindSuperJournal:
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.ended {
		return
	}
	i, ok := w.slots[id]
	if !ok {
		switch n := len(w.free); {
		case n > 0:
			i, w.free = w.free[n-1], w.free[:n-1]
		case w.used < slotCount:
			i = w.used
			w.used++
		default:
			return // 65,536 open names: the attributes' time-out has to do for the rest
		}
		w.slots[id] = i
	}
	slot := w.mem[i*slotSize:][:slotSize]
	slot[8] = byte(kind) + 1
	binary.NativeEndian.PutUint64(slot, id)
}

// forget removes a node that the kernel has forgotten.
func (w *watched) forget(id uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if i, ok := w.slots[id]; ok {
		clear(w.mem[i*slotSize:][:slotSize])
		delete(w.slots, id)
		w.free = append(w.free, i)
	}
}

// start starts the watcher and keeps one running until stop.
func (w *watched) start(conn int, dir, how string) error {
	w.mu.Lock()
	w.conn, w.dir, w.how = conn, dir, how
	w.mu.Unlock()
	return w.spawn()
}

func (w *watched) spawn() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.ended {
		return nil
	}
	theirs, ours, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("watcher: %w", err)
	}
	defer theirs.Close()
	conn, err := unix.FcntlInt(uintptr(w.conn), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		ours.Close()
		return fmt.Errorf("watcher: %w", err)
	}
	connFile := os.NewFile(uintptr(conn), deviceFile)
	defer connFile.Close()
	lock := w.lock
	if lock == nil {
		if lock, err = os.Open(os.DevNull); err != nil {
			return fmt.Errorf("watcher: %w", err)
		}
		defer lock.Close()
	}
	cmd := exec.Command(w.argv[0], append(w.argv[1:len(w.argv):len(w.argv)], w.how, w.dir)...)
	cmd.Stderr = os.Stderr
	cmd.ExtraFiles = []*os.File{connFile, w.table, theirs, lock}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // a terminal's signals are not for it
	if err := cmd.Start(); err != nil {
		ours.Close()
		return fmt.Errorf("watcher: %w", err)
	}
	w.life, w.cmd = ours, cmd
	go w.respawn(cmd, ours)
	return nil
}

// respawn starts another watcher when one has died before its time.
func (w *watched) respawn(cmd *exec.Cmd, life *os.File) {
	err := cmd.Wait()
	w.mu.Lock()
	ended := w.ended
	w.mu.Unlock()
	if ended {
		return
	}
	life.Close()
	w.log.Warn("watcher of the mount died: starting another", "err", err)
	time.Sleep(time.Second)
	if err := w.spawn(); err != nil {
		w.log.Error("no watcher: programs that outlive a crash of the agent may read stale rows", "err", err)
	}
}

// stop ends the watcher: the agent unmounts by itself.
func (w *watched) stop() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.ended {
		return
	}
	w.ended = true
	if w.life != nil {
		_, _ = w.life.Write([]byte{1})
		w.life.Close()
	}
	_ = unix.Munmap(w.mem)
	w.mem = nil
	w.slots = nil
	w.table.Close()
}

// Watch is the watcher's process: the arguments are those that Mount adds to
// Options.Watcher. It returns when the agent has ended, one way or the other.
func Watch(args []string) error {
	if len(args) != 2 {
		return fmt.Errorf("watcher: started by the agent alone")
	}
	how, dir := args[0], args[1]
	var st unix.Stat_t
	statErr := unix.Stat(dir, &st)
	life := os.NewFile(watchLife, "life")
	var b [1]byte
	switch n, err := life.Read(b[:]); {
	case n == 1:
		return nil // unmounting by itself
	case err != io.EOF:
		return fmt.Errorf("watcher: %w", err)
	}
	start := time.Now()
	if err := abort(how, dir, &st, statErr); err != nil {
		// Without it a notification could wait for the dead agent for ever.
		fmt.Fprintf(os.Stderr, "litefs-agent: watcher: connection not aborted, programs may read stale rows: %v\n", err)
	} else {
		poison()
	}
	err := detach(dir, how, true)
	if errors.Is(err, unix.EINVAL) {
		err = nil // the abort took it away already: nobody had a file open
	}
	unix.Close(watchConn)
	fmt.Fprintf(os.Stderr, "litefs-agent: the agent was killed: programs were taken off the dead mount %s in %s\n",
		dir, time.Since(start).Round(100*time.Microsecond))
	return err
}

// abort ends the connection, so that no request waits for the dead agent.
func abort(how, dir string, st *unix.Stat_t, statErr error) error {
	if how == MethodDirect {
		// EBUSY is the normal answer while files are open: the abort came first.
		if err := unix.Unmount(dir, unix.MNT_FORCE); err == nil || err == unix.EBUSY {
			return nil
		}
	}
	return abortByNumber(st, statErr)
}

// abortByNumber ends the connection of a mount whose root has the attributes st:
// root may, and whoever mounted it.
func abortByNumber(st *unix.Stat_t, statErr error) error {
	if statErr != nil {
		return statErr
	}
	name := fmt.Sprintf("/sys/fs/fuse/connections/%d/abort", unix.Minor(uint64(st.Dev)))
	return os.WriteFile(name, []byte("1"), 0)
}

// poisonWait bounds the notifications: on an aborted connection they take
// microseconds.
const poisonWait = 500 * time.Millisecond

// poison makes every program notice: the header of a database and of a
// wal-index read as zeros, attributes are asked for again and fail. Database
// pages stay: dropping them would kill programs that map the file.
func poison() {
	c := &connection{fd: watchConn, log: slog.New(slog.DiscardHandler)}
	table, err := unix.Mmap(watchTable, 0, slotSize*slotCount, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := 0; i < slotCount; i++ {
			slot := table[i*slotSize:][:slotSize]
			if id := binary.NativeEndian.Uint64(slot); id != 0 && slot[8] > 0 {
				c.spoilNode(id, store.Kind(slot[8]-1))
			}
		}
	}()
	select {
	case <-done:
	case <-time.After(poisonWait):
	}
}

// spoilNode is what programs notice of one node when its mount has gone.
func (c *connection) spoilNode(id uint64, kind store.Kind) {
	var zeros [136]byte
	switch kind {
	case store.KindDatabase, store.KindOrdinary:
		_ = c.storeData(id, 0, zeros[:100])
		_ = c.invalidateInode(id, -1, 0)
	case store.KindShm:
		_ = c.storeData(id, 0, zeros[:])
	case store.KindJournal, store.KindWAL:
		_ = c.invalidateInode(id, 0, 0)
	}
}
