// Package ltx reads and writes LTX files, format version 3. An LTX file is one
// transaction of an SQLite database, or a contiguous range of them: the changed
// pages, the size afterwards, and the checksum of the whole database before and
// after. docs/ltx.md in this repository specifies the bytes.
//
// [AppendFile] makes a small file in memory, [Encoder] writes one to a stream,
// [Decoder] reads and verifies one from a stream, [ReadIndex] and [ReadPage]
// find single pages in a file, and [Compact] turns contiguous files into one.
//
// Whatever bytes are decoded, the answer is a value or an error that is
// [ErrCorrupt], never a panic, and memory is bounded by the page size and, for
// [ReadIndex], by the size of the file. Errors of an underlying reader or
// writer are wrapped and are not ErrCorrupt.
package ltx
