package hub

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/litefs-agent/litefs-agent/internal/config"
)

// A TokenFile is the file of [auth] tokens. A line is a token: the node that it
// names, the SHA-256 of its text, and when it was made. A token is 256 random
// bits, so that its plain hash gives nothing away.
//
//	pi-1 sha256:9f86d081...0a08 2026-11-22T10:00:00Z
type TokenFile struct {
	Path string
	// Owner is a path whose owner a new file gets: that of the hub's data folder,
	// so that the hub can read what root has made. Empty, or not there: nobody.
	Owner string
}

// A Token is one line of the file.
type Token struct {
	Node string
	hash [sha256.Size]byte
	Made time.Time
}

// tokenList is the content of a token file.
type tokenList struct {
	exists bool // the file
	tokens []Token
}

// who returns the node that a token names, "" if none has this token. It takes
// the same time whichever it is.
func (l tokenList) who(text string) (node string) {
	sum := sha256.Sum256([]byte(text))
	for i := range l.tokens {
		if subtle.ConstantTimeCompare(sum[:], l.tokens[i].hash[:]) == 1 {
			node = l.tokens[i].Node
		}
	}
	return node
}

const (
	tokenHashPrefix = "sha256:"
	tokenFileHead   = "# The nodes' tokens, made by 'litefs-agent hub token'. A line: node, hash of its token, when it was made.\n"
	maxTokenFile    = 16 << 20
)

func parseTokens(text []byte) (list []Token, err error) {
	n := 0
	for line := range bytes.Lines(text) {
		n++
		fields := strings.Fields(string(line))
		if len(fields) == 0 || strings.HasPrefix(fields[0], "#") {
			continue
		}
		var t Token
		hash, ok := "", len(fields) == 3
		if ok {
			hash, ok = strings.CutPrefix(fields[1], tokenHashPrefix)
		}
		sum, hexErr := hex.DecodeString(hash)
		if !ok || hexErr != nil || len(sum) != len(t.hash) || !config.ValidID(fields[0]) {
			return nil, fmt.Errorf("line %d: want NODE %sHASH TIME as 'litefs-agent hub token add' writes it", n, tokenHashPrefix)
		}
		if t.Made, err = time.Parse(time.RFC3339, fields[2]); err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
		t.Node = fields[0]
		copy(t.hash[:], sum)
		list = append(list, t)
	}
	return list, nil
}

// read returns the content; a file that is not there holds no token.
func (f TokenFile) read() (l tokenList, err error) {
	info, err := os.Stat(f.Path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return l, nil
	case err != nil:
		return l, fmt.Errorf("tokens: %w", err)
	case info.Size() > maxTokenFile:
		return l, fmt.Errorf("tokens: %s has %d bytes, more than %d", f.Path, info.Size(), maxTokenFile)
	}
	text, err := os.ReadFile(f.Path)
	if err == nil {
		l.exists = true
		if l.tokens, err = parseTokens(text); err != nil {
			err = fmt.Errorf("%s: %w", f.Path, err)
		}
	}
	if err != nil {
		return l, fmt.Errorf("tokens: %w", err)
	}
	return l, nil
}

// List returns all tokens in the order in which they were made.
func (f TokenFile) List() ([]Token, error) {
	l, err := f.read()
	return l.tokens, err
}

// Add makes a token for a node, beside those it has, and returns its text, which
// is kept nowhere.
func (f TokenFile) Add(node string) (text string, err error) {
	if !config.ValidID(node) {
		return "", fmt.Errorf("%q is no node id: 1 to 64 of A-Z a-z 0-9 _ -", node)
	}
	var random [32]byte
	_, _ = rand.Read(random[:]) // never fails
	text = hex.EncodeToString(random[:])
	t := Token{Node: node, hash: sha256.Sum256([]byte(text)), Made: time.Now().UTC().Truncate(time.Second)}
	return text, f.edit(func(list []Token) ([]Token, error) { return append(list, t), nil })
}

// ErrNoToken reports a node that has no token.
var ErrNoToken = errors.New("has no token")

// Revoke takes all tokens of a node away, or with keepNewest all but the newest.
// It returns how many went.
func (f TokenFile) Revoke(node string, keepNewest bool) (n int, err error) {
	return n, f.edit(func(list []Token) (kept []Token, err error) {
		newest, found := -1, false
		for i, t := range list {
			if t.Node == node {
				found = true
				if keepNewest && (newest < 0 || !t.Made.Before(list[newest].Made)) {
					newest = i
				}
			}
		}
		if !found {
			return nil, fmt.Errorf("%s: %w", node, ErrNoToken)
		}
		for i, t := range list {
			if t.Node != node || i == newest {
				kept = append(kept, t)
			} else {
				n++
			}
		}
		return kept, nil
	})
}

// edit replaces the content by what fn makes of it. Of several that edit at once
// each sees what the one before it has written.
func (f TokenFile) edit(fn func([]Token) ([]Token, error)) error {
	dir := filepath.Dir(f.Path)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("tokens: %w", err)
	}
	lock, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("tokens: %w", err)
	}
	defer lock.Close() // the lock goes with it
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("tokens: lock %s: %w", dir, err)
	}
	l, err := f.read()
	if err != nil {
		return err
	}
	list, err := fn(l.tokens)
	if err != nil {
		return err
	}
	var text bytes.Buffer
	text.WriteString(tokenFileHead)
	for _, t := range list {
		fmt.Fprintf(&text, "%s %s%x %s\n", t.Node, tokenHashPrefix, t.hash, t.Made.Format(time.RFC3339))
	}
	owner := f.Path
	if !l.exists {
		owner = f.Owner
	}
	if err := config.ReplaceFile(f.Path, text.Bytes(), 0o600, owner); err != nil {
		return fmt.Errorf("tokens: %w", err)
	}
	return nil
}

// permissionHint adds the cure to an error of reading the file.
func permissionHint(err error, path string) error {
	if errors.Is(err, syscall.EACCES) {
		return fmt.Errorf("%w: the hub runs as user %d: chown %s to it", err, os.Geteuid(), path)
	}
	return err
}
