package fuse

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"golang.org/x/sys/unix"
)

// A Fault is an error in mounting with its cause and cure.
type Fault struct {
	Err         error
	Cause, Cure string
}

func (f *Fault) Error() string { return fmt.Sprintf("%v\ncause: %s\ncure: %s", f.Err, f.Cause, f.Cure) }

func (f *Fault) Unwrap() error { return f.Err }

// fuseConf is where root admits allow_other.
const fuseConf = "/etc/fuse.conf"

// Diagnose looks for the cause of a failed [Mount] and returns err as a
// [*Fault], or as it is where it finds none.
func Diagnose(err error, opt Options) error {
	var known *Fault
	if err == nil || errors.As(err, &known) {
		return err
	}
	cause, cure := diagnose(err, opt)
	if cause == "" {
		return err
	}
	return &Fault{Err: err, Cause: cause, Cure: cure}
}

func diagnose(err error, opt Options) (cause, cure string) {
	if errors.Is(err, ErrMounted) {
		return "another process serves this mount point",
			fmt.Sprintf("stop it, or unmount what it left: fusermount3 -u %s", opt.Dir)
	}
	var attach *AttachError
	if !errors.As(err, &attach) {
		return "", ""
	}
	switch err := unix.Access(deviceFile, unix.R_OK|unix.W_OK); {
	case errors.Is(err, unix.ENOENT):
		return "there is no " + deviceFile, "load the kernel module: modprobe fuse"
	case err != nil:
		return fmt.Sprintf("this user may not open %s (%v)", deviceFile, err),
			fmt.Sprintf("chmod 0666 %s, Debian's default; in a container pass the device in", deviceFile)
	}
	if attach.Method == MethodDirect && errors.Is(attach.Err, unix.EPERM) {
		return "mount(2) needs root or CAP_SYS_ADMIN", "use the method fusermount (package fuse3), or run as root"
	}
	if attach.Method == MethodFusermount || os.Geteuid() != 0 {
		if cause, cure := diagnoseFusermount(opt); cause != "" {
			return cause, cure
		}
	}
	if errors.Is(attach.Err, unix.ENODEV) {
		return "the kernel has no FUSE", "load the kernel module: modprobe fuse"
	}
	return "", ""
}

func diagnoseFusermount(opt Options) (cause, cure string) {
	bin, err := fusermount()
	if errors.Is(err, exec.ErrNotFound) {
		return "fusermount3 is missing", "apt-get install fuse3"
	}
	if os.Geteuid() == 0 {
		return "", ""
	}
	if err == nil {
		if st, err := os.Stat(bin); err == nil && st.Mode()&os.ModeSetuid == 0 {
			return bin + " is not setuid root", "chown root " + bin + " && chmod 4755 " + bin
		}
	}
	if noNewPrivileges() {
		return "no_new_privs is set, so fusermount3 gains no rights",
			"remove NoNewPrivileges= and what implies it from the unit"
	}
	if opt.AllowOther && !userAllowOther() {
		return "allow_other is not admitted in " + fuseConf, "add a line user_allow_other to " + fuseConf
	}
	if err := unix.Access(opt.Dir, unix.W_OK); err != nil {
		return fmt.Sprintf("this user may not write to the folder %s (%v)", opt.Dir, err),
			fmt.Sprintf("chown it to uid %d and chmod 0700", os.Geteuid())
	}
	return "", ""
}

// MayAllowOther reports whether this process may use Options.AllowOther.
func MayAllowOther() bool { return os.Geteuid() == 0 || userAllowOther() }

// userAllowOther reports whether the file lets ordinary users use allow_other.
func userAllowOther() bool {
	b, err := os.ReadFile(fuseConf)
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(b)) {
		if strings.TrimSpace(line) == "user_allow_other" {
			return true
		}
	}
	return false
}

func noNewPrivileges() bool {
	n, err := unix.PrctlRetInt(unix.PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0)
	return err == nil && n == 1
}
