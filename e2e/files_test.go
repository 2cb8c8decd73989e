package e2e

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/litefs-agent/litefs-agent/internal/testrig"
)

// makeDB makes a database of n rows on plain ext4 and returns its path.
func makeDB(env *testrig.Env, base string, n int) string {
	env.Helper()
	path := filepath.Join(env.Folder("src"), base)
	env.SQL(path, "CREATE TABLE t(v,n);"+fill("t", n, 100))
	return path
}

// rows returns the number of rows of t.
func rows(env *testrig.Env, path string) string {
	env.Helper()
	return env.SQL(path, "SELECT count(*) FROM t;")
}

func txid(env *testrig.Env, path string, want uint64) {
	env.Helper()
	if got := env.Pos(path).TXID; got != want {
		env.Errorf("%s: got TXID %d, want %d", filepath.Base(path), got, want)
	}
}

// Ordinary files and folders behave as on any file system and outlive the agent.
func TestOrdinaryFiles(t *testing.T) {
	env := testrig.New(t)
	node := env.Node(testrig.Options{})
	script := `set -eu; cd "$1"; umask 022
mkdir -p a/b/c; echo one > a/f; echo two >> a/f; cp a/f a/b/g; mv a/b/g a/b/c/h; test "$(cat a/b/c/h)" = "$(printf 'one\ntwo')"
mv a/b a/x; test -f a/x/c/h; rmdir a/x/c 2>/dev/null && exit 1; ls a/x/c | grep -qx h
truncate -s 3 a/f; test "$(cat a/f)" = one; truncate -s 100000 a/f; test "$(stat -c %s a/f)" = 100000
sync a/f; sync a; dd if=/dev/urandom of=big bs=64k count=40 status=none conv=fsync; cp big big2; cmp big big2
dd if=/dev/zero of=big2 bs=1 seek=1000 count=10 conv=notrunc status=none; cmp -s big big2 && exit 1
echo hello > big2; test "$(cat big2)" = hello; touch -d @1000000000 big2; test "$(stat -c %Y big2)" = 1000000000
mkdir e; rmdir e; test "$(stat -c %h a)" = 1; rm a/x/c/h; echo text > note-pos; echo text > x.db-acked; test "$(cat note-pos)" = text
printf 'SQLite format 3\0 but not really' > fake.db; cat fake.db > /dev/null; test ! -e fake.db-pos
fallocate -l 5000 fa; test "$(stat -c %s fa)" = 5000
chmod 0640 big; test "$(stat -c %a big)" = 640; df . > /dev/null; sh -c 'echo append >> a/f & echo append >> a/f & wait'
tail -c 14 a/f | grep -c append | grep -qx 2`
	if out, err := testrig.Output(env.Command("bash", "-xc", script, "files", node.Mount), ""); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	sum := func() string {
		return env.Run("bash", "-c", `cd "$1" && find . -type f | sort | xargs md5sum && stat -c '%n %a %s' * a/*`, "sum", node.Mount)
	}
	before := sum()
	node.Stop()
	node.Start()
	if after := sum(); after != before {
		t.Errorf("after a restart got\n%s\nwant\n%s", after, before)
	}
}

// The modes of the configuration, not the umask, decide who may use what is
// made at the mount: a member of the group may, others may not.
func TestModesAndGroup(t *testing.T) {
	env := testrig.New(t)
	node := env.Node(testrig.Options{})
	env.SQL(node.Path("a.db"), "CREATE TABLE t(v); INSERT INTO t VALUES(1);")
	env.Run("bash", "-c", `cd "$1"; umask 077; mkdir d d/e; echo x > d/f`, "sh", node.Mount)
	for path, want := range map[string]os.FileMode{
		".": os.ModeDir | os.ModeSetgid | 0o770, "d": os.ModeDir | os.ModeSetgid | 0o770, "d/e": os.ModeDir | os.ModeSetgid | 0o770,
		"a.db": 0o660, "d/f": 0o660, "a.db-pos": 0o444,
	} {
		if fi, err := os.Stat(node.Path(path)); err != nil || fi.Mode() != want {
			t.Errorf("%s: got %v (%v), want %v", path, fi.Mode(), err, want)
		}
	}
	query := func(groups ...uint32) (string, error) {
		cmd := testrig.AsUser(env.Command("sqlite3", "-batch", "-bail", node.Path("a.db")), groups...)
		return testrig.Output(cmd, "INSERT INTO t VALUES(2); SELECT count(*) FROM t;")
	}
	if out, err := query(0); err != nil || out != "2" { // the mount's group is root's here
		t.Errorf("a member of the group: got %v, %s; want 2", err, out)
	}
	if out, err := query(); err == nil {
		t.Errorf("somebody else: got %s, want an error", out)
	}
	cmd := testrig.AsUser(env.Command("bash", "-c", `cd "$1" && echo y > d/e/g && mkdir d/e/h && sqlite3 d/e/h/b.db 'CREATE TABLE t(v)' && rm d/f`, "sh", node.Mount), 0)
	env.Must(cmd, "")
	txid(env, node.Path("d/e/h/b.db"), 1)
}

// Databases are copied and moved into, over and out of the mount.
func TestCopyAndMove(t *testing.T) {
	env := testrig.New(t)
	node := env.Node(testrig.Options{})
	one, two := makeDB(env, "one", 10), makeDB(env, "two", 500)
	at := node.Path
	sh := func(script string) (string, error) {
		return testrig.Output(env.Command("bash", "-c", "cd \""+node.Mount+"\"; "+script), "")
	}
	must := func(script string) {
		t.Helper()
		if out, err := sh(script); err != nil {
			t.Fatalf("%s: %v\n%s", script, err, out)
		}
	}
	fails := func(script, want string) {
		t.Helper()
		if out, err := sh(script); err == nil || !strings.Contains(out, want) {
			t.Errorf("%s: got %v, %s; want %s", script, err, out, want)
		}
	}

	must("cp " + one + " a.db")
	txid(env, at("a.db"), 1)
	sameFile(t, at("a.db"), one)
	env.SQL(at("a.db"), "INSERT INTO t VALUES('x',0);")
	txid(env, at("a.db"), 2)
	if got := rows(env, at("a.db")); got != "11" {
		t.Errorf("rows of a copied database: got %s, want 11", got)
	}

	fails("cp "+two+" a.db", "Permission denied")
	fails("cat "+two+" > a.db", "Permission denied")
	fails("dd if="+two+" of=a.db conv=notrunc status=none", "Permission denied")
	fails("dd if=/dev/zero of=a.db bs=1 count=1 seek=40 conv=notrunc status=none", "Permission denied")
	fails("truncate -s 0 a.db", "Permission denied")
	fails("truncate -s 4096 a.db", "Permission denied")
	txid(env, at("a.db"), 2)

	must("cp " + two + " tmp && mv tmp a.db")
	txid(env, at("a.db"), 3)
	sameFile(t, at("a.db"), two)
	env.SQL(at("a.db"), "INSERT INTO t VALUES('x',0);")
	txid(env, at("a.db"), 4)
	if got := rows(env, at("a.db")); got != "501" {
		t.Errorf("rows of a replaced database: got %s, want 501", got)
	}
	if testrig.Exists(at("tmp")) || testrig.Exists(at("tmp-pos")) {
		t.Error("the temporary file is still there")
	}

	// Like rsync: a hidden temporary file, written in pieces, renamed at once.
	for range 5 {
		for _, src := range []string{one, two} {
			must("dd if=" + src + " of=.a.db.Xy12 bs=700 status=none && mv -T .a.db.Xy12 a.db")
			sameFile(t, at("a.db"), src)
		}
	}
	txid(env, at("a.db"), 14)
	checkDB(env, at("a.db"))

	// In use: a connection would go on with what it has cached.
	s := env.Session(at("a.db"))
	s.Do("SELECT count(*) FROM t;")
	fails("cp "+one+" tmp && mv -T tmp a.db", "busy")
	s.Do("INSERT INTO t VALUES('y',1);")
	s.Close()
	txid(env, at("a.db"), 15)
	must("rm tmp")

	// mv from another file system removes the target first; then it is made again.
	must("cp " + one + " ../z && rm a.db && mv ../z a.db")
	txid(env, at("a.db"), 17)
	sameFile(t, at("a.db"), one)
	must("rm a.db && cp " + two + " a.db") // before anything was flushed
	sameFile(t, at("a.db"), two)
	txid(env, at("a.db"), 19)
	node.Verify()

	// Out, by copy and by move.
	out := filepath.Join(env.Folder("out"), "a")
	must("cp a.db " + out)
	sameFile(t, out, two)
	must("mv a.db " + out)
	sameFile(t, out, two)
	if testrig.Exists(at("a.db")) || testrig.Exists(at("a.db-pos")) {
		t.Error("a.db is still there after it moved out")
	}
	// A new name is a drop and a new database; TXIDs of both go on.
	must("cp " + one + " a.db && cat a.db-pos && mv a.db b.db")
	txid(env, at("b.db"), 1)
	must("mv b.db a.db")
	txid(env, at("a.db"), 23)
	sameFile(t, at("a.db"), one)
	must("cp " + one + " plain && mv plain c.db && cat c.db > /dev/null")
	sameFile(t, at("c.db"), one)

	before := env.Pos(at("a.db"))
	node.Restart()
	if after := env.Pos(at("a.db")); after != before {
		t.Errorf("after a restart: got %v, want %v", after, before)
	}
	sameFile(t, at("a.db"), one)
	sameFile(t, at("c.db"), one)
	if testrig.Exists(at("b.db")) {
		t.Error("b.db came back")
	}
}

// A drop is one transaction, and what is made again under the name continues.
func TestDropAndAgain(t *testing.T) {
	env := testrig.New(t)
	node := env.Node(testrig.Options{})
	for _, mode := range modes {
		path := node.Path(mode + ".db")
		want := uint64(0)
		for round := range 3 {
			env.SQL(path, "PRAGMA journal_mode="+mode+"; CREATE TABLE t(v); INSERT INTO t VALUES(1); INSERT INTO t VALUES(2);")
			want += 3
			if mode == "wal" {
				want++
			}
			txid(env, path, want)
			if round == 1 {
				node.Restart()
				txid(env, path, want)
			}
			for _, suffix := range []string{"", "-journal", "-wal"} {
				if err := os.Remove(path + suffix); err != nil && !errors.Is(err, os.ErrNotExist) {
					t.Fatal(err)
				}
			}
			want++
			for _, suffix := range []string{"", "-pos", "-acked", "-writer", "-journal", "-wal", "-shm"} {
				if testrig.Exists(path + suffix) {
					t.Errorf("%s%s is there after the drop", path, suffix)
				}
			}
		}
	}
	// Under an open connection: it must not harm what takes the name.
	path := node.Path("open.db")
	for _, mode := range modes {
		old := env.Session(path)
		old.Do("PRAGMA journal_mode=" + mode + "; CREATE TABLE t(v); INSERT INTO t VALUES(1);")
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		env.SQL(path, "CREATE TABLE t(v); INSERT INTO t VALUES(10),(11);")
		if out, ok := old.Try("INSERT INTO t VALUES(2);"); ok && !testrig.IsError(out) {
			t.Errorf("%s: a write to a dropped database was accepted", mode)
		}
		old.Close()
		if got := env.SQL(path, "SELECT group_concat(v) FROM t; PRAGMA integrity_check;"); got != "10,11\nok" {
			t.Errorf("%s: the new database: got %s", mode, got)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
}

// What gives no commit point, or takes no locks, is refused before anything
// changes, on new and on existing databases.
func TestRefusals(t *testing.T) {
	env := testrig.New(t)
	node := env.Node(testrig.Options{})
	old := node.Path("old.db")
	env.SQL(old, "CREATE TABLE t(v); INSERT INTO t VALUES(1);")
	before := env.Pos(old)
	run := func(db, sql string, args ...string) (string, error) {
		return testrig.Output(env.Command("sqlite3", append(append([]string{"-batch", "-bail"}, args...), db)...), sql)
	}
	for _, mode := range []string{"memory", "off"} {
		for _, path := range []string{old, node.Path(mode + ".db")} {
			if out, err := run(path, "PRAGMA journal_mode="+mode+"; CREATE TABLE u(v); INSERT INTO u VALUES(1);"); err == nil {
				t.Errorf("journal_mode=%s on %s: got %s, want an error", mode, path, out)
			}
		}
		if fi, err := os.Stat(node.Path(mode + ".db")); err == nil && fi.Size() > 0 || testrig.Exists(node.Path(mode+".db-pos")) {
			t.Errorf("journal_mode=%s left a new database", mode)
		}
		// The same name serves a program that does it right.
		env.SQL(node.Path(mode+".db"), "CREATE TABLE t(v);")
		txid(env, node.Path(mode+".db"), 1)
	}
	for _, args := range [][]string{{"-vfs", "unix-none"}, {"-vfs", "unix-dotfile"}} {
		if out, err := run(old, "INSERT INTO t VALUES(2);", args...); err == nil {
			t.Errorf("%v: got %s, want an error", args, out)
		}
	}
	if out, err := run("file:"+old+"?nolock=1", "INSERT INTO t VALUES(2);"); err == nil {
		t.Errorf("nolock: got %s, want an error", out)
	}
	for _, left := range []string{"-journal", "-wal", ".lock"} {
		os.RemoveAll(old + left)
	}
	if got := env.SQL(old, "SELECT count(*) FROM t; PRAGMA integrity_check;"); got != "1\nok" {
		t.Errorf("after the refusals: got %s", got)
	}
	if after := env.Pos(old); after != before {
		t.Errorf("position after the refusals: got %v, want %v", after, before)
	}
	// unix-excl keeps to the rules.
	if out, err := run(old, "INSERT INTO t VALUES(2); SELECT count(*) FROM t;", "-vfs", "unix-excl"); err != nil || out != "2" {
		t.Errorf("unix-excl: got %v, %s; want 2", err, out)
	}
	txid(env, old, before.TXID+1)
}

// The computed files of a node that stands alone.
func TestComputedFiles(t *testing.T) {
	env := testrig.New(t)
	node := env.Node(testrig.Options{ID: "pi-7"})
	path := node.Path("sub/a.db")
	if err := os.Mkdir(node.Path("sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	is := func(path, want string) {
		t.Helper()
		b, err := os.ReadFile(path)
		if err != nil || string(b) != want {
			t.Errorf("%s: got %q (%v), want %q", path, b, err, want)
		}
		if fi, err := os.Stat(path); err != nil || fi.Size() != int64(len(want)) {
			t.Errorf("%s: got size %d, want %d", path, fi.Size(), len(want))
		}
	}
	const zero = "0000000000000000/0000000000000000\n"
	env.SQL(path, "CREATE TABLE t(v);")
	is(path+"-acked", zero)
	is(path+"-writer", "pi-7\n")
	is(node.Path(".lag"), "+2147483647\n") // no hub was ever heard
	txid(env, path, 1)
	if testrig.Exists(node.Path(".primary")) {
		t.Error(".primary is there without a hub-owned database")
	}
	names := env.Run("ls", filepath.Dir(path))
	if want := "a.db\na.db-acked\na.db-pos\na.db-writer"; names != want {
		t.Errorf("ls: got %q, want %q", names, want)
	}
	// Two reads through one descriptor see the same and then the new position.
	f, err := os.Open(path + "-pos")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	first := env.Pos(path)
	env.SQL(path, "INSERT INTO t VALUES(1);")
	if second := env.Pos(path); second.TXID != first.TXID+1 || second.Checksum == first.Checksum {
		t.Errorf("position: got %v after %v", second, first)
	}
}

// The errno of system calls, seen from outside.
func TestErrnos(t *testing.T) {
	env := testrig.New(t)
	node := env.Node(testrig.Options{})
	at := node.Path
	env.SQL(at("a.db"), "CREATE TABLE t(v);")
	env.SQL(at("b.db"), "CREATE TABLE t(v);")
	env.Run("bash", "-c", `cd "$1"; mkdir d full; echo x > full/f; echo x > f; echo y > g`, "sh", node.Mount)
	open := func(name string, flags int) error {
		f, err := os.OpenFile(at(name), flags, 0o644)
		if err == nil {
			f.Close()
		}
		return err
	}
	write := func(name string, off int64) error {
		f, err := os.OpenFile(at(name), os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = f.WriteAt([]byte("x"), off)
		return err
	}
	long := strings.Repeat("n", 256)
	tests := []struct {
		name string
		call func() error
		want error
	}{
		{"O_TRUNC of a database", func() error { return open("a.db", os.O_WRONLY|os.O_TRUNC) }, syscall.EACCES},
		{"truncate a database", func() error { return os.Truncate(at("a.db"), 0) }, syscall.EACCES},
		{"write to a database", func() error { return write("a.db", 100) }, syscall.EACCES},
		{"write at its start", func() error { return write("a.db", 0) }, syscall.EACCES},
		{"write behind its end", func() error { return write("a.db", 1<<20) }, syscall.EACCES},
		{"create NAME-pos", func() error { return open("a.db-pos", os.O_WRONLY|os.O_CREATE) }, syscall.EACCES},
		{"create NAME-acked", func() error { return open("a.db-acked", os.O_RDWR|os.O_CREATE|os.O_TRUNC) }, syscall.EACCES},
		{"write NAME-writer", func() error { return open("a.db-writer", os.O_WRONLY) }, syscall.EACCES},
		{"create NAME-pos exclusively", func() error { return open("a.db-pos", os.O_WRONLY|os.O_CREATE|os.O_EXCL) }, syscall.EEXIST},
		{"mkdir NAME-pos", func() error { return os.Mkdir(at("a.db-pos"), 0o755) }, syscall.EEXIST},
		{"unlink NAME-pos", func() error { return os.Remove(at("a.db-pos")) }, syscall.EACCES},
		{"rename to NAME-pos", func() error { return os.Rename(at("f"), at("a.db-pos")) }, syscall.EACCES},
		{"rename NAME-pos", func() error { return os.Rename(at("a.db-pos"), at("h")) }, syscall.EPERM},
		{"truncate NAME-pos", func() error { return os.Truncate(at("a.db-pos"), 0) }, syscall.EACCES},
		{"mkdir nodes", func() error { return os.Mkdir(at("nodes"), 0o755) }, syscall.EACCES},
		{"file over a database", func() error { return os.Rename(at("f"), at("a.db")) }, syscall.EACCES},
		{"folder over a database", func() error { return os.Rename(at("d"), at("a.db")) }, syscall.ENOTDIR},
		{"database over a folder", func() error { return unix.Rename(at("a.db"), at("d")) }, syscall.EISDIR},
		{"rename without replacing", func() error {
			return unix.Renameat2(unix.AT_FDCWD, at("f"), unix.AT_FDCWD, at("g"), unix.RENAME_NOREPLACE)
		}, syscall.EEXIST},
		{"exchange", func() error {
			return unix.Renameat2(unix.AT_FDCWD, at("f"), unix.AT_FDCWD, at("g"), unix.RENAME_EXCHANGE)
		}, syscall.EINVAL},
		{"over a full folder", func() error { return unix.Rename(at("d"), at("full")) }, syscall.ENOTEMPTY},
		{"rmdir of a full folder", func() error { return unix.Rmdir(at("full")) }, syscall.ENOTEMPTY},
		{"rmdir of a database", func() error { return unix.Rmdir(at("a.db")) }, syscall.ENOTDIR},
		{"unlink of a folder", func() error { return unix.Unlink(at("d")) }, syscall.EISDIR},
		{"open what is not there", func() error { return open("none", os.O_RDONLY) }, syscall.ENOENT},
		{"below what is not there", func() error { return open("none/x", os.O_WRONLY|os.O_CREATE) }, syscall.ENOENT},
		{"below a file", func() error { return open("f/x", os.O_WRONLY|os.O_CREATE) }, syscall.ENOTDIR},
		{"unlink what is not there", func() error { return unix.Unlink(at("none")) }, syscall.ENOENT},
		{"rename what is not there", func() error { return os.Rename(at("none"), at("n2")) }, syscall.ENOENT},
		{"mkdir of what is there", func() error { return os.Mkdir(at("d"), 0o755) }, syscall.EEXIST},
		{"O_EXCL of what is there", func() error { return open("f", os.O_WRONLY|os.O_CREATE|os.O_EXCL) }, syscall.EEXIST},
		{"write a folder", func() error { return open("d", os.O_WRONLY) }, syscall.EISDIR},
		{"a long name", func() error { return open(long, os.O_WRONLY|os.O_CREATE) }, syscall.ENAMETOOLONG},
		{"hard link", func() error { return os.Link(at("f"), at("l")) }, syscall.EPERM},
		{"hard link of a database", func() error { return os.Link(at("a.db"), at("l")) }, syscall.EPERM},
		{"symlink", func() error { return os.Symlink("f", at("l")) }, syscall.EPERM},
		{"fifo", func() error { return unix.Mkfifo(at("l"), 0o644) }, syscall.EPERM},
		{"chown", func() error { return os.Chown(at("a.db"), testrig.User, testrig.User) }, syscall.EPERM},
		{"xattr", func() error { return unix.Setxattr(at("f"), "user.x", []byte("y"), 0) }, syscall.ENOTSUP},
		{"punch a hole into a database", func() error {
			f, err := os.OpenFile(at("a.db"), os.O_RDWR, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 100)
		}, syscall.ENOTSUP},
	}
	before := env.Pos(at("a.db"))
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			if err := test.call(); !errors.Is(err, test.want) {
				t.Errorf("got %v, want %v", err, test.want)
			}
		})
	}
	if after := env.Pos(at("a.db")); after != before {
		t.Errorf("position: got %v, want %v", after, before)
	}
	checkDB(env, at("a.db"))
}

// A look-up and a read cost nothing to what programs do at the same time: all of
// it goes on while a computed file is polled.
func TestPollPosition(t *testing.T) {
	env := testrig.New(t)
	node := env.Node(testrig.Options{})
	path := node.Path("a.db")
	env.SQL(path, "PRAGMA journal_mode=wal; CREATE TABLE t(v,n);")
	done := make(chan struct{})
	go func() {
		defer close(done)
		if out, err := env.TrySQL(path, strings.Repeat("INSERT INTO t VALUES('x',1);\n", 500)); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
	}()
	last, deadline := uint64(0), time.After(time.Minute)
	for running := true; running; {
		select {
		case <-done:
			running = false
		case <-deadline:
			t.Fatal("still writing after a minute")
		default:
		}
		now := env.Pos(path).TXID
		if now < last {
			t.Fatalf("position went back from %d to %d", last, now)
		}
		last = now
	}
	if last != 502 {
		t.Errorf("position at the end: got %d, want 502", last)
	}
}
