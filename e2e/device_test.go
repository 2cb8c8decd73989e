package e2e

import (
	"bufio"
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	gofuse "github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// A device is a disk with a volatile cache, as one file that a loop device lies
// on: what was not flushed is lost in part when its power is cut, and each kind
// of request can be made to fail. It is served by a process of its own, since
// nobody may open files of a mount that the own process serves.
//
// It obeys lines on stdin, each answered by a line "ok" and the number of
// requests that failed since the one before:
//
//	cut SEED         the power goes: of what was not flushed some sectors are kept,
//	                 some are lost; from now on every request fails
//	fail KIND,...    requests of these kinds fail with EIO: read, write, flush;
//	                 with " once" behind them only the next one
//	slow DURATION    a flush takes so long
//	on               nothing fails and nothing is slow any more
type device struct {
	gofuse.RawFileSystem

	mu      sync.Mutex
	now     []byte             // what reads see
	durable []byte             // what survives a power cut
	dirty   map[int64]struct{} // sectors written since the last flush
	fails   map[string]bool
	once    bool // the next failure is the last
	failedN int
	slow    time.Duration // of a flush
}

const (
	deviceRole = "device"
	deviceName = "img" // of its one file
	sector     = 512
	sectorsIn  = 4096 / sector
)

// serveDevice is the helper: its arguments are the mount point and the size in
// bytes. It ends when stdin does.
func serveDevice(args []string) int {
	var size int
	if _, err := fmt.Sscan(args[1], &size); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	d := &device{RawFileSystem: gofuse.NewDefaultRawFileSystem(), dirty: make(map[int64]struct{})}
	for _, p := range []*[]byte{&d.now, &d.durable} { // memory only for what is written
		var err error
		if *p, err = unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON|unix.MAP_NORESERVE); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	srv, err := gofuse.NewServer(d, args[0], &gofuse.MountOptions{
		MaxWrite: 512 << 10, DirectMountStrict: true, DisableXAttrs: true, FsName: "device", Name: "device",
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	go srv.Serve()
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		fmt.Println("ok", d.obey(lines.Text()))
	}
	if err := srv.Unmount(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func (d *device) obey(line string) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	verb, arg, _ := strings.Cut(line, " ")
	failed := d.failedN
	d.failedN, d.fails = 0, map[string]bool{}
	switch verb {
	case "cut":
		var seed uint64
		fmt.Sscan(arg, &seed)
		d.cut(rand.New(rand.NewPCG(seed, 4)))
		arg = "read,write,flush"
		fallthrough
	case "fail":
		arg, d.once = strings.CutSuffix(arg, " once")
		for kind := range strings.SplitSeq(arg, ",") {
			d.fails[kind] = true
		}
	case "slow":
		var err error
		if d.slow, err = time.ParseDuration(arg); err != nil {
			panic(err)
		}
	case "on":
		d.slow = 0
	default:
		panic("no such command: " + line)
	}
	return failed
}

// cut loses what was not flushed: whole pages, and of some their sectors.
func (d *device) cut(r *rand.Rand) {
	keep := []int{0, 10, 50, 90, 100}[r.IntN(5)] // per cent
	pages := make(map[int64]bool)
	for at := range d.dirty {
		page := at / sectorsIn
		if _, ok := pages[page]; !ok {
			pages[page] = r.IntN(100) < keep
		}
		kept := pages[page]
		if page%8 == int64(keep)%8 { // torn
			kept = r.IntN(2) == 0
		}
		from, to := d.durable, d.now
		if kept {
			from, to = to, from
		}
		copy(to[at*sector:(at+1)*sector], from[at*sector:(at+1)*sector])
	}
	clear(d.dirty)
}

// failing reports whether a request of that kind is to fail. mu is held.
func (d *device) failing(kind string) bool {
	if !d.fails[kind] {
		return false
	}
	d.failedN++
	if d.once {
		clear(d.fails)
	}
	return true
}

func (d *device) Read(_ <-chan struct{}, in *gofuse.ReadIn, buf []byte) (gofuse.ReadResult, gofuse.Status) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.failing("read") {
		return nil, gofuse.EIO
	}
	n := 0
	if off := int64(in.Offset); off < int64(len(d.now)) {
		n = copy(buf, d.now[off:])
	}
	return gofuse.ReadResultData(buf[:n]), gofuse.OK
}

func (d *device) Write(_ <-chan struct{}, in *gofuse.WriteIn, data []byte) (uint32, gofuse.Status) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.failing("write") {
		return 0, gofuse.EIO
	}
	off := int64(in.Offset)
	if off+int64(len(data)) > int64(len(d.now)) {
		return 0, gofuse.Status(syscall.ENOSPC)
	}
	if to := d.now[off : off+int64(len(data))]; !bytes.Equal(to, data) {
		copy(to, data)
	}
	for at := off / sector; at < (off+int64(len(data))+sector-1)/sector; at++ {
		d.dirty[at] = struct{}{}
	}
	return uint32(len(data)), gofuse.OK
}

func (d *device) Fsync(<-chan struct{}, *gofuse.FsyncIn) gofuse.Status {
	d.mu.Lock()
	slow := d.slow
	d.mu.Unlock()
	time.Sleep(slow)
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.failing("flush") {
		return gofuse.EIO
	}
	for at := range d.dirty {
		if from, to := d.now[at*sector:(at+1)*sector], d.durable[at*sector:(at+1)*sector]; !bytes.Equal(from, to) {
			copy(to, from)
		}
	}
	clear(d.dirty)
	return gofuse.OK
}

func (d *device) attr(out *gofuse.Attr) {
	out.Ino, out.Size, out.Mode, out.Nlink = 2, uint64(len(d.now)), syscall.S_IFREG|0o600, 1
	out.Blksize, out.Blocks = 4096, uint64(len(d.now)/sector)
}

func (d *device) Lookup(_ <-chan struct{}, _ *gofuse.InHeader, name string, out *gofuse.EntryOut) gofuse.Status {
	if name != deviceName {
		return gofuse.ENOENT
	}
	out.NodeId = 2
	out.SetEntryTimeout(1 << 40)
	out.SetAttrTimeout(1 << 40)
	d.attr(&out.Attr)
	return gofuse.OK
}

func (d *device) GetAttr(_ <-chan struct{}, in *gofuse.GetAttrIn, out *gofuse.AttrOut) gofuse.Status {
	out.SetTimeout(1 << 40)
	if in.NodeId == gofuse.FUSE_ROOT_ID {
		out.Ino, out.Mode, out.Nlink = 1, syscall.S_IFDIR|0o755, 2
	} else {
		d.attr(&out.Attr)
	}
	return gofuse.OK
}

func (d *device) SetAttr(_ <-chan struct{}, _ *gofuse.SetAttrIn, out *gofuse.AttrOut) gofuse.Status {
	d.attr(&out.Attr)
	return gofuse.OK
}

func (d *device) Open(_ <-chan struct{}, _ *gofuse.OpenIn, out *gofuse.OpenOut) gofuse.Status {
	out.OpenFlags = gofuse.FOPEN_DIRECT_IO
	return gofuse.OK
}

func (d *device) Flush(<-chan struct{}, *gofuse.FlushIn) gofuse.Status { return gofuse.OK }
func (d *device) Release(<-chan struct{}, *gofuse.ReleaseIn)           {}
