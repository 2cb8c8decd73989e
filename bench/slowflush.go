package main

import (
	"context"
	"os"
	"syscall"
	"time"

	gofuse "github.com/hanwen/go-fuse/v2/fuse"
)

// slowName is the one file of a slow file system.
const slowName = "img"

// A slowFS shows one file over another whose fsync takes its time: an SD card in
// kind, where a loop device lies on it. Only flushes are slow.
type slowFS struct {
	gofuse.RawFileSystem
	back  *os.File
	size  int64
	delay time.Duration
}

// slowFlush serves the file back at folder dir until ctx ends.
func slowFlush(ctx context.Context, back, dir, delay string) error {
	d, err := time.ParseDuration(delay)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(back, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	fs := &slowFS{RawFileSystem: gofuse.NewDefaultRawFileSystem(), back: f, size: info.Size(), delay: d}
	srv, err := gofuse.NewServer(fs, dir, &gofuse.MountOptions{
		MaxWrite: 1 << 20, DirectMountStrict: true, DisableXAttrs: true, FsName: "slowflush", Name: "slowflush",
	})
	if err != nil {
		return err
	}
	go func() {
		<-ctx.Done()
		for srv.Unmount() != nil { // until its loop device is gone
			time.Sleep(20 * time.Millisecond)
		}
	}()
	srv.Serve()
	return nil
}

func (fs *slowFS) attr(out *gofuse.Attr) {
	out.Ino, out.Size, out.Mode, out.Nlink = 2, uint64(fs.size), syscall.S_IFREG|0o600, 1
	out.Blksize, out.Blocks = 4096, uint64(fs.size/512)
}

func (fs *slowFS) Lookup(_ <-chan struct{}, _ *gofuse.InHeader, name string, out *gofuse.EntryOut) gofuse.Status {
	if name != slowName {
		return gofuse.ENOENT
	}
	out.NodeId = 2
	out.SetEntryTimeout(time.Hour)
	out.SetAttrTimeout(time.Hour)
	fs.attr(&out.Attr)
	return gofuse.OK
}

func (fs *slowFS) GetAttr(_ <-chan struct{}, in *gofuse.GetAttrIn, out *gofuse.AttrOut) gofuse.Status {
	out.SetTimeout(time.Hour)
	if in.NodeId == gofuse.FUSE_ROOT_ID {
		out.Ino, out.Mode, out.Nlink = 1, syscall.S_IFDIR|0o755, 2
	} else {
		fs.attr(&out.Attr)
	}
	return gofuse.OK
}

func (fs *slowFS) SetAttr(_ <-chan struct{}, _ *gofuse.SetAttrIn, out *gofuse.AttrOut) gofuse.Status {
	fs.attr(&out.Attr)
	return gofuse.OK
}

func (fs *slowFS) Open(_ <-chan struct{}, _ *gofuse.OpenIn, out *gofuse.OpenOut) gofuse.Status {
	out.OpenFlags = gofuse.FOPEN_DIRECT_IO
	return gofuse.OK
}

func (fs *slowFS) Read(_ <-chan struct{}, in *gofuse.ReadIn, buf []byte) (gofuse.ReadResult, gofuse.Status) {
	n, err := syscall.Pread(int(fs.back.Fd()), buf, int64(in.Offset))
	if err != nil {
		return nil, gofuse.ToStatus(err)
	}
	return gofuse.ReadResultData(buf[:n]), gofuse.OK
}

func (fs *slowFS) Write(_ <-chan struct{}, in *gofuse.WriteIn, data []byte) (uint32, gofuse.Status) {
	n, err := syscall.Pwrite(int(fs.back.Fd()), data, int64(in.Offset))
	return uint32(max(n, 0)), gofuse.ToStatus(err)
}

func (fs *slowFS) Fsync(<-chan struct{}, *gofuse.FsyncIn) gofuse.Status {
	time.Sleep(fs.delay)
	return gofuse.OK
}

func (fs *slowFS) Flush(<-chan struct{}, *gofuse.FlushIn) gofuse.Status { return gofuse.OK }
func (fs *slowFS) Release(<-chan struct{}, *gofuse.ReleaseIn)           {}
