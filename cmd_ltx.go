package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/litefs-agent/litefs-agent/ltx"
)

func newLTX(a *app) *cobra.Command {
	list := a.jsonFlag(&cobra.Command{
		Use:   "list FILE...",
		Short: "print a line for each file: positions, sizes, time",
		Args:  cobra.MinimumNArgs(1),
		RunE:  func(_ *cobra.Command, files []string) error { return a.ltxList(files) },
	})
	dump := a.jsonFlag(&cobra.Command{
		Use:   "dump FILE...",
		Short: "print header, pages and trailer of each file",
		Args:  cobra.MinimumNArgs(1),
		RunE:  func(_ *cobra.Command, files []string) error { return a.ltxDump(files) },
	})
	verify := a.jsonFlag(&cobra.Command{
		Use:   "verify FILE...",
		Short: "read files whole and verify their checksums",
		Args:  cobra.MinimumNArgs(1),
		RunE:  func(_ *cobra.Command, files []string) error { return a.ltxVerify(files) },
	})
	return group("ltx", "inspect LTX files, or export the history of a database as such", list, dump, verify, newLTXExport(a))
}

// ltxFile is one file as list and dump print it in JSON.
type ltxFile struct {
	File      string    `json:"file"`
	Size      int64     `json:"size"`
	MinTXID   ltx.TXID  `json:"min_txid"`
	MaxTXID   ltx.TXID  `json:"max_txid"`
	Snapshot  bool      `json:"snapshot"`
	PageSize  uint32    `json:"page_size"`
	Commit    uint32    `json:"commit"` // pages
	Time      time.Time `json:"time"`
	NodeID    string    `json:"node_id"` // 16 hex digits
	Flags     uint32    `json:"flags"`
	Pre       *string   `json:"pre_apply_checksum"` // null: not tracked
	Post      *string   `json:"post_apply_checksum"`
	File64    string    `json:"file_checksum"`
	PageN     int       `json:"pages"` // in the file
	WALOffset int64     `json:"wal_offset"`
	WALSize   int64     `json:"wal_size"`
	WALSalt1  uint32    `json:"wal_salt1"`
	WALSalt2  uint32    `json:"wal_salt2"`
	Pages     []ltxPage `json:"page_index,omitempty"` // dump only
}

type ltxPage struct {
	Pgno   uint32 `json:"pgno"`
	Offset int64  `json:"offset"`
	Size   int64  `json:"size"` // compressed, with its header
}

// readLTX reads header, index and trailer.
func readLTX(name string) (ltxFile, error) {
	file, err := os.Open(name)
	if err != nil {
		return ltxFile{}, err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return ltxFile{}, err
	}
	h, err := ltx.ReadHeader(file)
	if err != nil {
		return ltxFile{}, fmt.Errorf("%s: %w", name, err)
	}
	index, t, err := ltx.ReadIndex(file, info.Size())
	if err != nil {
		return ltxFile{}, fmt.Errorf("%s: %w", name, err)
	}
	f := ltxFile{
		File: name, Size: info.Size(),
		MinTXID: h.MinTXID, MaxTXID: h.MaxTXID, Snapshot: h.IsSnapshot(),
		PageSize: h.PageSize, Commit: h.Commit, Time: time.UnixMilli(h.Timestamp).UTC(),
		NodeID: fmt.Sprintf("%016x", h.NodeID), Flags: h.Flags,
		File64: t.FileChecksum.String(), PageN: len(index),
		WALOffset: h.WALOffset, WALSize: h.WALSize, WALSalt1: h.WALSalt1, WALSalt2: h.WALSalt2,
	}
	if !h.NoChecksum() {
		pre, post := h.PreApplyChecksum.String(), t.PostApplyChecksum.String()
		f.Pre, f.Post = &pre, &post
	}
	for _, entry := range index {
		f.Pages = append(f.Pages, ltxPage(entry))
	}
	return f, nil
}

// eachLTX reads every file and hands those that can be read to add. Its error
// has a line for each that cannot.
func eachLTX(names []string, add func(ltxFile) error) error {
	var errs []error
	for _, name := range names {
		f, err := readLTX(name)
		if err == nil {
			err = add(f)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func (a *app) ltxList(names []string) error {
	files := []ltxFile{}
	err := eachLTX(names, func(f ltxFile) error {
		f.Pages = nil
		files = append(files, f)
		return nil
	})
	if a.json {
		return errors.Join(printJSON(a.stdout, files), err)
	}
	table := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "MIN\tMAX\tPRE-APPLY\tPOST-APPLY\tPAGES\tPAGE SIZE\tCOMMIT\tSIZE\tTIME\tFILE")
	for _, f := range files {
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%d\t%d\t%d\t%d\t%s\t%s\n", f.MinTXID, f.MaxTXID, orDash(f.Pre), orDash(f.Post),
			f.PageN, f.PageSize, f.Commit, f.Size, f.Time.Format(time.RFC3339), f.File)
	}
	return errors.Join(table.Flush(), err)
}

func (a *app) ltxDump(names []string) error {
	if a.json {
		files := []ltxFile{}
		err := eachLTX(names, func(f ltxFile) error {
			files = append(files, f)
			return nil
		})
		return errors.Join(printJSON(a.stdout, files), err)
	}
	return eachLTX(names, func(f ltxFile) error {
		table := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
		for _, row := range []struct {
			name  string
			value any
		}{
			{"file", f.File}, {"size", f.Size}, {"min txid", f.MinTXID}, {"max txid", f.MaxTXID}, {"snapshot", f.Snapshot},
			{"page size", f.PageSize}, {"commit", f.Commit}, {"time", f.Time.Format(time.RFC3339Nano)}, {"node id", f.NodeID},
			{"flags", fmt.Sprintf("%08x", f.Flags)}, {"pre-apply checksum", orDash(f.Pre)}, {"post-apply checksum", orDash(f.Post)},
			{"file checksum", f.File64}, {"wal offset", f.WALOffset}, {"wal size", f.WALSize},
			{"wal salts", fmt.Sprintf("%08x %08x", f.WALSalt1, f.WALSalt2)}, {"pages", f.PageN},
		} {
			fmt.Fprintf(table, "%s\t%v\n", row.name, row.value)
		}
		if err := table.Flush(); err != nil {
			return err
		}
		if len(f.Pages) > 0 {
			fmt.Fprintln(table, "PGNO\tOFFSET\tSIZE")
		}
		for _, page := range f.Pages {
			fmt.Fprintf(table, "%d\t%d\t%d\n", page.Pgno, page.Offset, page.Size)
		}
		fmt.Fprintln(table)
		return table.Flush()
	})
}

// ltxVerdict is what verify prints of each file in JSON.
type ltxVerdict struct {
	File    string  `json:"file"`
	OK      bool    `json:"ok"`
	Pos     *string `json:"pos"` // after the file; null if it is not ok
	Problem *string `json:"problem"`
}

func (a *app) ltxVerify(names []string) error {
	verdicts := []ltxVerdict{}
	bad := 0
	for _, name := range names {
		pos, err := verifyLTX(name)
		verdict := ltxVerdict{File: name, OK: err == nil}
		if err != nil {
			text := err.Error()
			verdict.Problem = &text
			bad++
		} else {
			text := pos.String()
			verdict.Pos = &text
		}
		verdicts = append(verdicts, verdict)
		if a.json {
			continue
		}
		if verdict.OK {
			fmt.Fprintf(a.stdout, "ok       %s  %s\n", *verdict.Pos, name)
		} else {
			fmt.Fprintf(a.stdout, "PROBLEM  %s: %s\n", name, *verdict.Problem)
		}
	}
	if a.json {
		if err := printJSON(a.stdout, verdicts); err != nil {
			return err
		}
	}
	if bad > 0 {
		return fmt.Errorf("%d of %d files do not verify", bad, len(names))
	}
	return nil
}

func verifyLTX(name string) (ltx.Pos, error) {
	file, err := os.Open(name)
	if err != nil {
		return ltx.Pos{}, err
	}
	defer file.Close()
	h, t, err := ltx.Verify(file)
	if err != nil {
		return ltx.Pos{}, err
	}
	info, err := file.Stat()
	if err != nil {
		return ltx.Pos{}, err
	}
	if _, _, err := ltx.ReadIndex(file, info.Size()); err != nil { // reads by the index go by it alone
		return ltx.Pos{}, err
	}
	return ltx.Pos{TXID: h.MaxTXID, PostApplyChecksum: t.PostApplyChecksum}, nil
}

func newLTXExport(a *app) *cobra.Command {
	var db, dir string
	var force bool
	cmd := dbFlag(&cobra.Command{
		Use:   "export --db NAME -o DIR",
		Short: "write what the service holds of a database's history as MIN-MAX.ltx files",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := os.MkdirAll(dir, 0o777); err != nil {
				return err
			}
			return a.client().ExportLTX(cmd.Context(), db, func(name string, _ int64, r io.Reader) error {
				if _, _, err := ltx.ParseFilename(name); err != nil {
					return err
				}
				path := filepath.Join(dir, name)
				err := writeFile(path, force, func(w io.Writer) error {
					_, err := io.Copy(w, r)
					return err
				})
				if err != nil {
					return err
				}
				_, err = fmt.Fprintln(a.stdout, path)
				return err
			})
		},
	}, &db, true)
	outputFlags(cmd, &dir, "`DIR` to write to, made where it is missing", &force)
	return cmd
}
