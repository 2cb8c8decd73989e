// Reftool makes and reads LTX files with the reference implementation, for the
// tests of package ltx. It is a module of its own so that the agent does not
// depend on the reference.
//
//	reftool encode DB LTX        a snapshot of an SQLite database, TXID 1
//	reftool decode LTX DB        the database of a snapshot
//	reftool compact LTX LTX...   the first from the others
package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"os"

	"github.com/superfly/ltx"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "reftool:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) < 3 {
		return fmt.Errorf("usage: reftool encode DB LTX | decode LTX DB | compact LTX LTX...")
	}
	switch args[0] {
	case "encode":
		return encode(args[1], args[2])
	case "decode":
		return decode(args[1], args[2])
	case "compact":
		return compact(args[1], args[2:])
	}
	return fmt.Errorf("unknown command %s", args[0])
}

func encode(src, dst string) error {
	db, err := os.ReadFile(src)
	if err != nil {
		return err
	}
	size := uint32(binary.BigEndian.Uint16(db[16:]))
	if size == 1 {
		size = 65536
	}
	out, err := os.Create(dst)
	if err != nil {
		return err
	}
	defer out.Close()
	enc, err := ltx.NewEncoder(out)
	if err != nil {
		return err
	}
	n := uint32(len(db)) / size
	h := ltx.Header{Version: ltx.Version, PageSize: size, Commit: n, MinTXID: 1, MaxTXID: 1, Timestamp: 1700000000000}
	if err := enc.EncodeHeader(h); err != nil {
		return err
	}
	post := ltx.ChecksumFlag
	for pgno := uint32(1); pgno <= n; pgno++ {
		page := db[(pgno-1)*size : pgno*size]
		if err := enc.EncodePage(ltx.PageHeader{Pgno: pgno}, page); err != nil {
			return err
		}
		post = ltx.ChecksumFlag | (post ^ ltx.ChecksumPage(pgno, page))
	}
	enc.SetPostApplyChecksum(post)
	if err := enc.Close(); err != nil {
		return err
	}
	return out.Close()
}

func decode(src, dst string) error {
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.Create(dst)
	if err != nil {
		return err
	}
	defer out.Close()
	if err := ltx.NewDecoder(in).DecodeDatabaseTo(out); err != nil {
		return err
	}
	return out.Close()
}

func compact(dst string, srcs []string) error {
	out, err := os.Create(dst)
	if err != nil {
		return err
	}
	defer out.Close()
	var in []io.Reader
	for _, src := range srcs {
		f, err := os.Open(src)
		if err != nil {
			return err
		}
		defer f.Close()
		in = append(in, f)
	}
	c, err := ltx.NewCompactor(out, in)
	if err != nil {
		return err
	}
	if err := c.Compact(context.Background()); err != nil {
		return err
	}
	return out.Close()
}
