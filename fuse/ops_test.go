package fuse_test

import (
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/litefs-agent/litefs-agent/fuse"
	"github.com/litefs-agent/litefs-agent/store"
)

func TestCalls(t *testing.T) {
	for _, tc := range []struct {
		name  string
		lines []string
	}{
		{"create and read back", []string{
			"open a f.txt rw,create 0640 = ok", "fstat a = ok 100640 0 links=1", "write a 0 hello = ok", "fsync a = ok",
			"read a 0 10 = ok \"hello\"", "stat f.txt = ok 100640 5 links=1", "close a = ok",
			"open b f.txt ro = ok", "read b 1 3 = ok \"ell\"", "read b 5 3 = ok \"\"",
		}},
		{"exclusive", []string{"open a f rw,create,excl = ok", "open b f rw,create,excl = EEXIST", "open c none rw = ENOENT"}},
		{"truncate at open", []string{
			"open a f rw,create = ok", "write a 0 hello = ok", "open b f rw,trunc = ok", "fstat b = ok 100644 0 links=1",
			"fstat a = ok 100644 0 links=1",
		}},
		{"append", []string{
			"open a f rw,create,append = ok", "append a one = ok", "append a two = ok", "read a 0 9 = ok \"onetwo\"",
			"open b x.db-wal rw,create,append = ok", "append b one = ok", "append b two = ok", "read b 0 9 = ok \"onetwo\"",
		}},
		{"sizes", []string{
			"open a f rw,create = ok", "truncate f 5000 = ok", "fstat a = ok 100644 5000 links=1", "ftruncate a 10 = ok",
			"stat f = ok 100644 10 links=1", "fallocate a 0 0 8192 = ok", "stat f = ok 100644 8192 links=1",
			"fallocate a 1 0 9000 = ENOTSUP", "fallocate a 3 0 100 = ENOTSUP", "truncate f -1 = EINVAL",
		}},
		{"attributes", []string{
			"open a f rw,create = ok", "chmod f 0600 = ok", "stat f = ok 100600 0 links=1", "utimes f 1234567 = ok",
			"mtime f = ok 1234567", "owner f = ok 0:0", "chown f 0 0 = ok", "chown f -1 0 = ok", "chown f 5 -1 = EPERM",
			"chown f -1 5 = EPERM",
		}},
		{"folders", []string{
			"mkdir d 0755 = ok", "mkdir d 0755 = EEXIST", "mkdir d/e 0700 = ok", "stat d/e = ok 40700 0 links=1",
			"open a d/e/x.db rw,create = ok", "write a 0 deep = ok", "rmdir d = ENOTEMPTY", "list d = ok e",
			"rename d g 0 = ok", "list . = ok g", "open b g/e/x.db ro = ok", "read b 0 9 = ok \"deep\"", "stat d = ENOENT",
			"stat d/e/x.db = ENOENT", "open c g/e/y.db rw,create = ok", "list g/e = ok x.db y.db", "unlink g/e/x.db = ok",
			"unlink g/e/y.db = ok", "rmdir g/e = ok", "rmdir g = ok", "list . = ok", "unlink g = ENOENT", "rmdir none/x = ENOENT",
			"open f file rw,create = ok", "rmdir file = ENOTDIR", "mkdir file/x 0700 = ENOTDIR", "mkdir h 0755 = ok", "unlink h = EISDIR",
			"open x h rw = EISDIR", "chdir h = ok", "rmdir h = ok",
		}},
		{"rename", []string{
			"open a one rw,create = ok", "write a 0 1 = ok", "open b two rw,create = ok", "write b 0 2 = ok",
			"rename one two 1 = EEXIST", "rename one two 2 = EINVAL", "rename one three 1 = ok", "rename three two 0 = ok",
			"list . = ok two", "open c two ro = ok", "read c 0 9 = ok \"1\"", "read b 0 9 = ok \"2\"", "fstat b = ok 100644 1 links=0",
			"rename none two 0 = ENOENT", "stat one = ENOENT", "stat three = ENOENT", "open d one rw,create,excl = ok",
		}},
		{"unlinked files go on", []string{
			"open a x.db rw,create = ok", "write a 0 old = ok", "unlink x.db = ok", "open b x.db rw,create,excl = ok", "write b 0 new = ok",
			"read a 0 9 = ok \"old\"", "read b 0 9 = ok \"new\"", "write a 3 er = ok", "read a 0 9 = ok \"older\"",
		}},
		{"what there is not", []string{
			"open a f rw,create = ok", "link f g = EPERM", "symlink f g = EPERM", "mknod p 010644 = EPERM", "mknod r 0100600 = ok",
			"stat r = ok 100600 0 links=1", "mknod r 0100600 = EEXIST", "getxattr f = ENOTSUP", "ioctl a = ENOTTY",
			"rename f g 4 = EINVAL", "open t . rw,tmpfile = ENOTSUP",
		}},
		{"what the kernel does alone", []string{
			"open a f rw,create = ok", "write a 0 hello = ok", "seek a 0 3 = ok 0", "seek a 0 4 = ok 5", "seek a 9 3 = ENXIO",
			"open b g rw,create = ok", "seek a 0 0 = ok 0", "copy a b 5 = ok 5", "read b 0 9 = ok \"hello\"",
			"open c h rw,create = ok", "seek a 0 0 = ok 0", "copy a c 5 = ok 5",
			"open d . ro,dir = ok", "fsync d = ok", "fsync d = ok", "statfs . = ok 1073741824 255", "access f 6 = ok",
			"stat f = ok 100644 5 links=1",
		}},
		{"mapping", []string{
			"open a f rw,create = ok", "ftruncate a 4096 = ok", "map a 4096 = ok", "poke a 10 shared = ok", "open b f rw = ok",
			"read b 10 6 = ok \"shared\"", "write b 20 back = ok", "peek a 20 4 = ok \"back\"", "fsync a = ok",
		}},
		{"long names", []string{"open a " + strings.Repeat("n", 255) + " rw,create = ok", "open a " + strings.Repeat("n", 256) + " rw,create = ENAMETOOLONG",
			"stat " + strings.Repeat("n", 256) + " = ENAMETOOLONG"}},
		{"computed names are not remembered as absent", []string{"stat x.db-pos = ENOENT", "open a x.db-pos rw,create = ok", "stat x.db-pos = ok 100644 0 links=1"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, dir := mountFS(t, newMemFS(), fuse.Options{AllowOther: true})
			newProgram(t, dir, 0).want(tc.lines...)
		})
	}
}

func TestModesAndOwner(t *testing.T) {
	_, dir := mountFS(t, newMemFS(), fuse.Options{FileMode: 0o660, DirMode: 0o2770, Group: "1000", AllowOther: true})
	root := newProgram(t, dir, 0)
	root.want("stat . = ok 42770 0 links=1", "open a x.db rw,create 0644 = ok", "stat x.db = ok 100660 0 links=1", "owner x.db = ok 0:1000",
		"mkdir d 0700 = ok", "stat d = ok 42770 0 links=1")
	member := newProgram(t, dir, ordinaryUser)
	member.want("open a x.db rw = ok", "open b d/y.db rw,create 0600 = ok", "fstat b = ok 100660 0 links=1", "chown x.db -1 1000 = EPERM")
	other := newProgram(t, dir, 1001)
	other.want("open a x.db ro = EACCES", "stat d/y.db = EACCES")
}

func TestListManyNames(t *testing.T) {
	_, dir := mountFS(t, newMemFS(), fuse.Options{})
	p := newProgram(t, dir, 0)
	for i := range 1000 {
		p.want(fmt.Sprintf("mknod some-longer-file-name-%d 0100644 = ok", i))
	}
	p.want("list . = ok 1000 1000", "unlink some-longer-file-name-7 = ok", "list . = ok 999 999", "list . = ok 999 999")
}

func TestErrno(t *testing.T) {
	other := errors.New("some other error")
	var fault atomic.Pointer[error]
	fs := newMemFS()
	fs.lookup = func(path string) error {
		if path == "look" {
			return *fault.Load()
		}
		return nil
	}
	fs.onWrite = func(n *memNode, _ int64, _ []byte) error { return *fault.Load() }
	_, dir := mountFS(t, fs, fuse.Options{})
	p := newProgram(t, dir, 0)
	p.want("open a f rw,create = ok")
	for _, tc := range []struct {
		err  error
		want syscall.Errno
	}{
		{store.ErrExist, unix.EEXIST},
		{store.ErrNotExist, unix.ENOENT},
		{store.ErrNotDir, unix.ENOTDIR},
		{store.ErrIsDir, unix.EISDIR},
		{store.ErrNotEmpty, unix.ENOTEMPTY},
		{store.ErrReplica, unix.EACCES},
		{store.ErrRefused, unix.EACCES},
		{store.ErrOverwrite, unix.EACCES},
		{store.ErrReserved, unix.EACCES},
		{store.ErrBusy, unix.EBUSY},
		{store.ErrFenced, unix.EIO},
		{store.ErrStale, unix.ESTALE},
		{store.ErrCrossing, unix.EPERM},
		{syscall.ENOSPC, unix.ENOSPC},
		{syscall.ENOSYS, unix.EIO},
		{other, unix.EIO},
	} {
		t.Run(tc.err.Error(), func(t *testing.T) {
			fail := fmt.Errorf("somewhere: %w", tc.err)
			fault.Store(&fail)
			want := unix.ErrnoName(tc.want)
			if tc.want != unix.ENOENT && tc.want != unix.ESTALE { // the kernel looks twice
				p.want("stat look = " + want)
			}
			p.want("write a 0 x = " + want)
			if no, known := fuse.Errno(fail); no != tc.want || known != (tc.err != other && tc.err != syscall.ENOSYS) {
				t.Errorf("got %v %v, want %v", no, known, tc.want)
			}
		})
	}
}

func TestPanicIsOneError(t *testing.T) {
	fs := newMemFS()
	fs.onWrite = func(n *memNode, _ int64, p []byte) error {
		if string(p) == "bang" {
			panic("test")
		}
		return nil
	}
	panicked := make(chan store.Node, 1)
	_, dir := mountFS(t, fs, fuse.Options{OnPanic: func(n store.Node) { panicked <- n }})
	p := newProgram(t, dir, 0)
	p.want("open a f rw,create = ok", "write a 0 fine = ok", "write a 0 bang = EIO", "write a 0 good = ok", "read a 0 4 = ok \"good\"")
	got := <-panicked
	if want, _ := fs.Lookup("f"); got != want {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestRevealAndForget(t *testing.T) {
	revealed := make(chan store.Kind, 100)
	_, dir := mountFS(t, newMemFS(), fuse.Options{OnReveal: func(id uint64, kind store.Kind) {
		if id < 1<<20 {
			t.Errorf("got id %d, want a large one", id)
		}
		revealed <- kind
	}})
	p := newProgram(t, dir, 0)
	p.want("open a x.db rw,create = ok")
	if got := <-revealed; got != store.KindDatabase {
		t.Errorf("got kind %d, want %d", got, store.KindDatabase)
	}
}
