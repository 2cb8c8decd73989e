package ltx

// A Page is one page of a transaction on its way into a file.
type Page struct {
	Pgno uint32
	Data []byte // Header.PageSize bytes
	CRC  uint64 // PageCRC(Data)
}

// AppendFile appends a whole file to dst. Pages ascend by number. It neither
// keeps nor changes pages and, where dst has room for [MaxFileSize] bytes,
// allocates nothing. On error, [ErrInvalid] or [ErrOrder], dst is returned as it
// was. It is safe for concurrent use.
//
// A wrong Page.CRC or, unless the file is a snapshot, a wrong post makes a file
// that does not verify.
func AppendFile(dst []byte, h Header, pages []Page, post Checksum) ([]byte, error) {
	s := scratchPool.Get().(*scratch)
	defer scratchPool.Put(s)
	var f fileState
	b, err := f.appendHeader(dst, h, s.index)
	if err != nil {
		return dst, err
	}
	for i := range pages {
		p := &pages[i]
		if b, err = f.appendPage(b, p.Pgno, p.Data, p.CRC, nil, &s.compressor); err != nil {
			return dst, err
		}
	}
	b, _, err = f.appendEnd(b, post)
	s.index = f.index
	if err != nil {
		return dst, err
	}
	return b, nil
}
