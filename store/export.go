package store

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"

	"github.com/litefs-agent/litefs-agent/internal/disk"
	"github.com/litefs-agent/litefs-agent/internal/sabotage"
	"github.com/litefs-agent/litefs-agent/ltx"
)

// errDropped is what asking for an unknown or dropped database gives.
var errDropped = fmt.Errorf("database was dropped or never was: %w", ErrNotExist)

// pin keeps the files of a database open.
func (db *DB) pin() func() {
	db.file.mu.Lock()
	db.file.opens++
	db.file.mu.Unlock()
	return func() {
		db.file.mu.Lock()
		db.file.opens--
		db.file.mu.Unlock()
	}
}

// copyBatch is how many bytes of pages are read under one hold of the lock.
const copyBatch = 256 << 10

// Snapshot copies the database into a temporary file while programs write, and
// returns it with the position that it is at exactly. It takes no SQLite lock:
// pages are copied as they are, then the records that were committed meanwhile
// are put on top, and the checksum of the whole is compared.
func (db *DB) Snapshot() (*Image, error) {
	defer db.pin()()
	for range 4 {
		img, err := db.copyOnce()
		if err != errRetry {
			return img, err
		}
	}
	return nil, fmt.Errorf("%s: changes faster than it can be copied: %w", db.name, ErrBusy)
}

var errRetry = errors.New("records are gone")

// An Image is a copy of a database at one position. Close removes it.
type Image struct {
	disk.File
	Pos      ltx.Pos
	PageSize uint32
	Commit   uint32
	History  uint64
	Epoch    Epoch
}

func (db *DB) copyOnce() (*Image, error) {
	db.settle()
	f, err := db.st.fs.CreateTemp(".")
	if err != nil {
		return nil, err
	}
	img, err := db.copyInto(f)
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return img, nil
}

func (db *DB) copyInto(f disk.File) (*Image, error) {
	db.mu.Lock()
	start := db.at
	db.mu.Unlock()
	if start.Commit == 0 {
		return nil, fmt.Errorf("%s: %w", db.name, errDropped)
	}
	sums := make([]byte, int64(start.Commit)*sumSize)
	buf := make([]byte, max(copyBatch, int(start.PageSize)))
	per := uint32(len(buf)) / start.PageSize
	lock := ltx.LockPgno(start.PageSize)
	for pgno := uint32(1); pgno <= start.Commit; pgno += per {
		n := min(per, start.Commit-pgno+1)
		db.mu.Lock()
		if db.at.PageSize != start.PageSize {
			db.mu.Unlock()
			return nil, errRetry
		}
		for i := range n {
			p := buf[i*start.PageSize:][:start.PageSize]
			if err := db.page(pgno+i, p); err != nil {
				db.mu.Unlock()
				return nil, fmt.Errorf("%s: read page %d: %w", db.name, pgno+i, err)
			}
		}
		db.mu.Unlock()
		for i := range n {
			if pgno+i != lock {
				binary.BigEndian.PutUint64(sums[int64(pgno+i-1)*sumSize:], uint64(ltx.PageChecksum(pgno+i, buf[i*start.PageSize:][:start.PageSize])))
			}
		}
		if _, err := f.WriteAt(buf[:n*start.PageSize], int64(pgno-1)*int64(start.PageSize)); err != nil {
			return nil, db.st.noSpace(err)
		}
	}
	img := &Image{File: f, Pos: start.Pos, PageSize: start.PageSize, Commit: start.Commit}
	if err := db.redoInto(img, &sums, start); err != nil {
		return nil, err
	}
	var total uint64
	for i := 0; i < len(sums); i += sumSize {
		total ^= binary.BigEndian.Uint64(sums[i:])
	}
	if got := ltx.ChecksumFlag | ltx.Checksum(total); got != img.Pos.PostApplyChecksum {
		return nil, fmt.Errorf("%s: pages have checksum %s at %s: the database file is damaged; run verify", db.name, got, img.Pos)
	}
	return img, f.Truncate(int64(img.Commit) * int64(img.PageSize))
}

// redoInto puts the records that were committed since start on top of a copy.
func (db *DB) redoInto(img *Image, sums *[]byte, start position) error {
	db.mu.Lock()
	end := db.at
	img.History, img.Epoch = db.history, db.epoch
	list := slices.Clone(db.recs.list[db.recs.after(start.TXID):])
	db.mu.Unlock()
	if end.Commit == 0 {
		return fmt.Errorf("%s: %w", db.name, errDropped)
	}
	if end.TXID == start.TXID {
		return nil
	}
	if len(list) == 0 || list[0].min > start.TXID+1 {
		return errRetry
	}
	for _, e := range list {
		if e.max > end.TXID {
			break
		}
		if e.pageSize != start.PageSize || e.commit == 0 {
			return errRetry
		}
		if err := db.redoEntry(img, sums, e); err != nil {
			return err
		}
	}
	img.Pos, img.Commit = end.Pos, end.Commit
	*sums = (*sums)[:int64(end.Commit)*sumSize]
	return nil
}

func (db *DB) redoEntry(img *Image, sums *[]byte, e entry) error {
	if err := db.st.wlog.Wait(e.lsn); err != nil {
		return err
	}
	r, err := db.st.openRecord(e)
	if err != nil {
		return err
	}
	defer r.Close()
	dec := ltx.NewDecoder(r)
	h, err := dec.DecodeHeader()
	if err != nil {
		return err
	}
	need := int(int64(h.Commit) * sumSize)
	if len(*sums) > need {
		*sums = (*sums)[:need]
	}
	*sums = append(*sums, make([]byte, need-len(*sums))...)
	buf := make([]byte, h.PageSize)
	for {
		pgno, err := dec.DecodePage(buf)
		if err == io.EOF {
			return dec.Close()
		}
		if err != nil {
			return err
		}
		if _, err := img.WriteAt(buf, int64(pgno-1)*int64(h.PageSize)); err != nil {
			return db.st.noSpace(err)
		}
		binary.BigEndian.PutUint64((*sums)[int64(pgno-1)*sumSize:], uint64(ltx.PageChecksumFromCRC(pgno, h.PageSize, dec.PageCRC())))
	}
}

// WriteTo writes the copy as an SQLite database file.
func (img *Image) WriteTo(w io.Writer) (int64, error) {
	return io.Copy(w, io.NewSectionReader(img.File, 0, int64(img.Commit)*int64(img.PageSize)))
}

// WriteLTX writes the copy as an LTX snapshot.
func (img *Image) WriteLTX(w io.Writer, timestamp int64, node uint64) error {
	return encodePages(w, position{img.Pos, img.PageSize, img.Commit}, timestamp, node, func(pgno uint32, p []byte) error {
		_, err := img.ReadAt(p, int64(pgno-1)*int64(len(p)))
		return err
	})
}

func encodePages(w io.Writer, at position, timestamp int64, node uint64, read func(uint32, []byte) error) error {
	enc := ltx.NewEncoder(w)
	h := ltx.Header{
		PageSize: at.PageSize, Commit: at.Commit, MinTXID: 1, MaxTXID: at.TXID,
		Timestamp: timestamp, NodeID: node,
	}
	if err := enc.EncodeHeader(h); err != nil {
		return err
	}
	buf := make([]byte, at.PageSize)
	lock := ltx.LockPgno(at.PageSize)
	for pgno := uint32(1); pgno <= at.Commit; pgno++ {
		if pgno == lock {
			continue
		}
		if err := read(pgno, buf); err != nil {
			return err
		}
		if err := enc.EncodePage(pgno, buf); err != nil {
			return err
		}
	}
	_, err := enc.Close(at.PostApplyChecksum)
	return err
}

// encodeSnapshot writes the database at its present position. db.mu is held.
func (db *DB) encodeSnapshot(w io.Writer, at position) error {
	return encodePages(w, at, db.lastTime.UnixMilli(), db.st.nodeHash, db.page)
}

// copyDurable writes a file that is there whole or not at all.
func (st *Store) copyDurable(name string, r io.Reader) error {
	_, err := st.writeDurable(name, func(w io.Writer) error {
		_, err := io.Copy(w, r)
		return err
	})
	return err
}

// writeDurable is copyDurable of what content writes. It returns the size.
func (st *Store) writeDurable(name string, content func(io.Writer) error) (size int64, err error) {
	f, err := st.fs.OpenFile(name+".tmp", os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	size, err = writeBuffered(f, content)
	if err == nil && !sabotage.On(sabotage.LevelSynced) {
		err = f.Datasync()
	}
	if err == nil {
		err = st.fs.Rename(name+".tmp", name)
	}
	if err == nil {
		err = st.fs.SyncDir(path.Dir(name))
	}
	if err != nil {
		_ = st.fs.Remove(name + ".tmp")
	}
	return size, err
}

// writeBuffered writes content from the start of f and returns its size.
func writeBuffered(f io.WriterAt, content func(io.Writer) error) (size int64, err error) {
	out := &offsetWriter{w: f, buf: make([]byte, 0, offsetWriterSize)}
	if err = content(out); err == nil {
		err = out.flush()
	}
	return out.off, err
}
