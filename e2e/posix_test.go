package e2e

import (
	"flag"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/hanwen/go-fuse/v2/posixtest"

	"github.com/litefs-agent/litefs-agent/internal/testrig"
)

const (
	noLinks   = "a database with two names would have two journals: there are no links"
	noSymlink = "like hard links, symbolic ones are not there"
)

// posixRefused are the tests of go-fuse's posixtest that do not pass on the
// mount: what each says there, and why that is as it should be.
var posixRefused = map[string]struct {
	says, reason string
	everywhere   bool // also on the disk
}{
	"FallocateKeepSize": {says: "operation not supported", reason: "nothing is allocated beyond the end of a file: the log is where room is reserved"},
	"FcntlFlockLocksFile": {says: "FcntlFlock returned <nil>, expected EAGAIN", everywhere: true,
		reason: "POSIX locks of one process do not exclude each other; posixtest leaves it out as well"},
	"FileBasic":        {says: "got mode 100660, want 100755", reason: "[mount] file-mode gives a new file its mode"},
	"Link":             {says: "operation not permitted", reason: noLinks},
	"LinkUnlinkRename": {says: "operation not permitted", reason: noLinks},
	"OpenSymlinkRace":  {says: "shuffler: Symlink: operation not permitted", reason: noSymlink},
	"SetattrSymlink":   {says: "operation not permitted", reason: noSymlink},
	"SymlinkReadlink":  {says: "operation not permitted", reason: noSymlink},
	"XAttr":            {says: "does not support xattrs", reason: "there are no extended attributes: the kernel would ask for them before each write"},
}

// runPosix is the role of a process of its own that runs one test of posixtest:
// its name, and the folder to run it in, are the arguments that are no flags.
func runPosix([]string) int {
	name, dir := flag.Arg(0), flag.Arg(1)
	testing.Main(func(_, _ string) (bool, error) { return true, nil }, // it exits
		[]testing.InternalTest{{Name: name, F: func(t *testing.T) { posixtest.All[name](t, dir) }}}, nil, nil)
	return 1
}

// go-fuse's own test of what POSIX asks of a file system finds on the mount
// what it finds on the disk, but for what is refused.
func TestPosix(t *testing.T) {
	env := testrig.New(t)
	node := env.Node(testrig.Options{})
	// result returns what the test says, empty if it passes.
	result := func(t *testing.T, base, name string) string {
		dir := filepath.Join(base, name)
		if err := os.Mkdir(dir, 0o777); err != nil {
			t.Fatal(err)
		}
		out, err := testrig.Output(env.HelperCommand("posix", "-test.v", name, dir), "")
		if err == nil && strings.Contains(out, "--- PASS: "+name+" ") {
			return ""
		}
		return out
	}
	for _, name := range slices.Sorted(maps.Keys(posixtest.All)) {
		t.Run(name, func(t *testing.T) {
			refused := posixRefused[name]
			check := func(where, base string, fails bool) {
				switch says := result(t, base, name); {
				case !fails && says != "":
					t.Errorf("on %s:\n%s", where, says)
				case fails && !strings.Contains(says, refused.says):
					t.Errorf("on %s: got %q, want %q (%s)", where, says, refused.says, refused.reason)
				}
			}
			check("the disk", env.Folder("disk"), refused.everywhere)
			check("the mount", node.Mount, refused.says != "")
		})
	}
	for name := range posixRefused {
		if posixtest.All[name] == nil {
			t.Errorf("posixtest has no %s", name)
		}
	}
}
