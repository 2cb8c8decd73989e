package disk

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The range of FS.BlockSize. maxBlock is also what direct I/O is not needed
// for: a page.
const (
	minBlock = 512
	maxBlock = 4096
)

// AlignedBuffer returns n zero bytes that begin at a multiple of align (a power
// of two) in memory, as direct I/O wants them. Go's collector does not move it.
func AlignedBuffer(n, align int) []byte {
	if align <= 1 {
		return make([]byte, n)
	}
	b := make([]byte, n+align)
	skip := 0
	if rest := int(uintptr(unsafe.Pointer(&b[0])) & uintptr(align-1)); rest != 0 {
		skip = align - rest
	}
	return b[skip : skip+n : skip+n]
}

// findBlockSize returns the smallest unit that direct writes may have: what
// statx says (STATX_DIOALIGN, Linux 6.1), else the smallest of 512 and 4096 that
// a real write succeeds with, else 4096, which serves for padding where the file
// system has no direct I/O. A device that admits to larger physical sectors gets
// those: it would rewrite its sector around our smaller block, and lose the
// neighbours with it when the power fails (invariant 16).
func (d *osFS) findBlockSize() (int, error) {
	f, err := d.CreateTemp(".")
	if err != nil {
		return 0, err
	}
	defer f.Close()
	block := 0
	var st unix.Statx_t
	err = f.(*osFile).control("statx", func(fd int) error {
		if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, &st); err == nil &&
			st.Mask&unix.STATX_DIOALIGN != 0 {
			block = int(max(st.Dio_offset_align, st.Dio_mem_align))
		}
		if block == 0 {
			block = probe(fd)
		}
		return unix.Fstat(fd, new(unix.Stat_t))
	})
	if err != nil {
		return 0, err
	}
	return min(max(block, minBlock, d.physicalSector()), maxBlock), nil
}

// probe turns the open file fd to direct I/O and tries to write.
func probe(fd int) int {
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	if err != nil {
		return maxBlock
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFL, flags|unix.O_DIRECT); err != nil {
		return maxBlock
	}
	buf := AlignedBuffer(maxBlock, maxBlock)
	for block := minBlock; block < maxBlock; block *= 8 {
		// The second block too: the first may be exempt in an empty file.
		if _, err := unix.Pwrite(fd, buf[:block], 0); err != nil {
			continue
		}
		if _, err := unix.Pwrite(fd, buf[:block], int64(block)); err == nil {
			return block
		}
	}
	return maxBlock
}

// physicalSector is what sysfs says of the device below the root, 0 if unknown.
func (d *osFS) physicalSector() int {
	var st unix.Stat_t
	if unix.Fstat(int(d.dirF.Fd()), &st) != nil {
		return 0
	}
	dev := fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(uint64(st.Dev)), unix.Minor(uint64(st.Dev)))
	for _, up := range []string{"", ".."} { // a partition has its queue one folder up
		real, err := filepath.EvalSymlinks(dev)
		if err != nil {
			return 0
		}
		text, err := os.ReadFile(filepath.Join(real, up, "queue", "physical_block_size"))
		if err == nil {
			n, _ := strconv.Atoi(strings.TrimSpace(string(text)))
			return n
		}
	}
	return 0
}
