package ltx

import (
	"errors"
	"fmt"
	"io"
)

var (
	// ErrCorrupt reports bytes that are no valid LTX file. The text around it
	// says where and what. A file that ends early is also io.ErrUnexpectedEOF.
	ErrCorrupt = errors.New("corrupt ltx file")
	// ErrOrder reports a page that may not come next: its number does not
	// ascend, is 0, the lock page or beyond commit, or a snapshot skips one.
	ErrOrder = errors.New("ltx page out of order")
	// ErrState reports a call that is not allowed now, such as a page before
	// the header.
	ErrState = errors.New("ltx call out of turn")
	// ErrInvalid reports arguments that would make an invalid file, or text that
	// is no TXID, checksum, position or file name.
	ErrInvalid = errors.New("invalid ltx value")
	// ErrNotContiguous reports files of which one does not begin where the
	// previous one ends.
	ErrNotContiguous = errors.New("ltx files not contiguous")
)

// corruptf returns an error that is ErrCorrupt, for byte off of the file.
func corruptf(off int64, format string, args ...any) error {
	return fmt.Errorf("%w: byte %d: %w", ErrCorrupt, off, fmt.Errorf(format, args...))
}

// readError returns the error for a read of what at byte off that gave err: the
// end of the input is corruption, anything else is the reader's own fault.
func readError(off int64, what string, err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return corruptf(off, "%s: %w", what, io.ErrUnexpectedEOF)
	}
	return fmt.Errorf("read %s at byte %d: %w", what, off, err)
}
