package fuse

import (
	"fmt"
	"os"

	gofuse "github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/litefs-agent/litefs-agent/store"
)

// Errno is errno, for tests of its table.
var Errno = errno

// MountStock serves fs by go-fuse's own server, for comparison. It has no peer.
func MountStock(fs store.FS, opt Options) (stop func(), err error) {
	opt.setDefaults()
	fd, err := attachDirect(opt.Dir, opt)
	if err != nil {
		return nil, err
	}
	m := newRawFS(fs, opt, opt.Logger, uint32(os.Geteuid()), uint32(os.Getegid()))
	m.noOpenDir = true
	s, err := gofuse.NewServer(m, fmt.Sprintf("/dev/fd/%d", fd), &gofuse.MountOptions{
		ExplicitDataCacheControl: true, DisableXAttrs: true, DisableReadDirPlus: true, DisableSplice: true,
		ExtraCapabilities: gofuse.CAP_NO_OPENDIR_SUPPORT, MaxWrite: maxWrite,
	})
	if err != nil {
		return nil, err
	}
	go s.Serve()
	return func() {
		unix.Unmount(opt.Dir, unix.MNT_DETACH)
		s.Wait()
	}, nil
}
