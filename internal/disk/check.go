package disk

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// ErrUnfit reports a file system that cannot keep what was synced, or that
// cannot be told from one.
var ErrUnfit = errors.New("unfit file system")

// Report is what Check found about the file system of a folder.
type Report struct {
	Name    string // "ext4", or "0x1234abcd" for one that we do not know
	Fit     bool   // what is synced there survives a power cut
	Warning string // for a fit one: what to know, "" for nothing
	Reason  string // for an unfit one
	Cure    string // what the operator can do about Warning or Reason
}

type verdict struct {
	name, reason, cure string
	fit                bool
}

const (
	cureLocal   = "put the data folder on an ext4 file system on a local disk"
	cureNewer   = "format the partition as ext4 and mount it at the data folder"
	cureOverlay = "mount a real partition (ext4) at the data folder; in a container use a volume"
)

// verdicts by f_type of statfs(2), 32 bits.
var verdicts = map[uint32]verdict{
	unix.EXT4_SUPER_MAGIC:  {name: "ext4", fit: true},
	unix.XFS_SUPER_MAGIC:   {name: "xfs", fit: true},
	unix.F2FS_SUPER_MAGIC:  {name: "f2fs", fit: true},
	unix.BTRFS_SUPER_MAGIC: {name: "btrfs", fit: true},

	unix.OVERLAYFS_SUPER_MAGIC: {name: "overlay", reason: "an overlay hides whether its upper layer survives a restart", cure: cureOverlay},
	unix.TMPFS_MAGIC:           {name: "tmpfs", reason: "it lives in memory and is gone after a power cut", cure: cureLocal},
	unix.RAMFS_MAGIC:           {name: "ramfs", reason: "it lives in memory and is gone after a power cut", cure: cureLocal},
	unix.MSDOS_SUPER_MAGIC:     {name: "vfat", reason: "it has no journal: a power cut can lose names and whole files", cure: cureNewer},
	unix.EXFAT_SUPER_MAGIC:     {name: "exfat", reason: "it has no journal: a power cut can lose names and whole files", cure: cureNewer},
	unix.V9FS_MAGIC:            {name: "9p", reason: "the machine behind it decides what a sync means", cure: cureLocal},
	unix.NFS_SUPER_MAGIC:       {name: "nfs", reason: "a server may lose or repeat writes, and O_TMPFILE and locks differ", cure: cureLocal},
	unix.SMB_SUPER_MAGIC:       {name: "smb", reason: "a server may lose or repeat writes", cure: cureLocal},
	unix.SMB2_SUPER_MAGIC:      {name: "smb", reason: "a server may lose or repeat writes", cure: cureLocal},
	unix.CIFS_SUPER_MAGIC:      {name: "cifs", reason: "a server may lose or repeat writes", cure: cureLocal},
	unix.FUSE_SUPER_MAGIC:      {name: "fuse", reason: "the program behind it decides what a sync means (is this a mount of litefs-agent?)", cure: cureLocal},
}

// Check says by statfs(2) which file system holds root and whether it keeps
// what was synced. The error wraps ErrUnfit, with reason and cure, when it does
// not; a caller that was told to go on all the same may. On btrfs it turns
// copy-on-write off for files made in root from now on (chattr +C).
func Check(root string) (Report, error) {
	var st unix.Statfs_t
	if err := retry(func() error { return unix.Statfs(root, &st) }); err != nil {
		return Report{}, &os.PathError{Op: "statfs", Path: root, Err: err}
	}
	magic := uint32(st.Type)
	v, known := verdicts[magic]
	if !known {
		v = verdict{name: fmt.Sprintf("%#x", magic), reason: "nobody has tested power cuts on it", cure: cureLocal}
	}
	rep := Report{Name: v.name, Fit: v.fit, Reason: v.reason, Cure: v.cure}
	if magic == unix.BTRFS_SUPER_MAGIC {
		if err := noCopyOnWrite(root); err != nil {
			rep.Warning = "btrfs copies what is rewritten: slower, and a full disk shows late (chattr +C: " + err.Error() + ")"
			rep.Cure = "chattr +C the data folder while it is empty, or use ext4"
		} else {
			rep.Warning = "btrfs: copy-on-write is off for new files of the data folder, and with it their checksums"
			rep.Cure = "use ext4 where that matters"
		}
	}
	if !rep.Fit {
		return rep, fmt.Errorf("%s: %w: %s: %s; %s", root, ErrUnfit, rep.Name, rep.Reason, rep.Cure)
	}
	return rep, nil
}

func noCopyOnWrite(root string) error {
	const noCOW = 0x00800000 // FS_NOCOW_FL of linux/fs.h
	dir, err := os.Open(root)
	if err != nil {
		return err
	}
	defer dir.Close()
	fd := int(dir.Fd())
	flags, err := unix.IoctlGetUint32(fd, unix.FS_IOC_GETFLAGS)
	if err != nil || flags&noCOW != 0 {
		return err
	}
	return unix.IoctlSetPointerInt(fd, unix.FS_IOC_SETFLAGS, int(flags|noCOW))
}
