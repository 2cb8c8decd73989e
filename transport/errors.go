package transport

import (
	"errors"
	"fmt"
	"time"
)

var (
	// ErrClosed reports use of a Conn or server after its own Close.
	ErrClosed = errors.New("session closed")
	// ErrEnded reports that the peer said goodbye; it is returned as a [*ByeError].
	ErrEnded = errors.New("session ended by the peer")
	// ErrLost reports that the link broke or the peer went silent. What was not
	// acknowledged is in doubt; dial again.
	ErrLost = errors.New("link lost")
	// ErrRefused reports that the peer does not want us and that trying again
	// cannot help before somebody changes something. It is returned as a [*ByeError].
	ErrRefused = errors.New("refused")
	// ErrBusy reports a refusal that time cures. It is returned as a [*ByeError].
	ErrBusy = errors.New("busy")
	// ErrVersion reports that the two ends have no protocol version in common, or
	// that one demands a feature that the other lacks.
	ErrVersion = errors.New("no common protocol version")
	// ErrTooLarge reports a frame, or a stream, beyond the agreed limit.
	ErrTooLarge = errors.New("too large")
	// ErrCorrupt reports bytes that are not what docs/protocol.md allows.
	ErrCorrupt = errors.New("corrupt frame")
	// ErrUnknown reports a message, or a mandatory field, that this version does
	// not know.
	ErrUnknown = errors.New("unknown message or field")
)

// A Code says why a session ended or was refused. The numbers are part of the
// protocol; an unknown one is treated as temporary.
type Code uint16

const (
	CodeNone     Code = iota // ended without complaint
	CodeShutdown             // the process stops; come back
	CodeBusy                 // too many sessions, or no resources
	CodeInternal             // a fault at the peer, in its log
	CodeReplaced             // the same node opened a newer session
	CodeIdle                 // nothing happened for too long
	CodeVersion              // no common version, or a feature is missing
	CodeCorrupt              // what arrived cannot be understood
	CodeUnknown              // unknown message, or unknown mandatory field
	CodeTooLarge             // a frame or a stream beyond the limits
	CodeProtocol             // understood, but not allowed now
	CodeAuth                 // no, or no longer, authorised
	CodeSite                 // the node belongs to another site
	CodeClone                // the session number belongs to other hardware
	CodeNodeID               // the node's id is not acceptable
	codeN
)

var codeText = [codeN]string{"none", "shutdown", "busy", "internal", "replaced", "idle", "version", "corrupt",
	"unknown", "too large", "protocol", "auth", "site", "clone", "node id"}

func (c Code) String() string {
	if c < codeN {
		return codeText[c]
	}
	return fmt.Sprintf("code %d", uint16(c))
}

// Permanent reports whether trying again cannot help before something changes at
// either end: a credential, an id, a version.
func (c Code) Permanent() bool {
	switch c {
	case CodeVersion, CodeAuth, CodeSite, CodeClone, CodeNodeID:
		return true
	}
	return false
}

// A ByeError is the peer's [Bye], or, from a Handler, the one to send. It matches
// [ErrEnded]; with a permanent code [ErrRefused], else, unless CodeNone,
// [ErrBusy]; and [ErrVersion], [ErrCorrupt], [ErrUnknown], [ErrTooLarge] by its code.
type ByeError struct {
	Code       Code
	Text       string        // for people; one line
	RetryAfter time.Duration // 0: the caller's own backoff
}

// Refuse returns the error with which a Handler refuses a session.
func Refuse(code Code, format string, args ...any) *ByeError {
	return &ByeError{Code: code, Text: fmt.Sprintf(format, args...)}
}

func (e *ByeError) Error() string {
	s := "peer ended the session: " + e.Code.String()
	if e.Text != "" {
		s += ": " + e.Text
	}
	return s
}

func (e *ByeError) Is(target error) bool {
	switch target {
	case ErrEnded:
		return true
	case ErrRefused:
		return e.Code.Permanent()
	case ErrBusy:
		return e.Code != CodeNone && !e.Code.Permanent()
	case ErrVersion:
		return e.Code == CodeVersion
	case ErrCorrupt:
		return e.Code == CodeCorrupt
	case ErrUnknown:
		return e.Code == CodeUnknown
	case ErrTooLarge:
		return e.Code == CodeTooLarge
	}
	return false
}

// A NakCode says why a push or a subscription was not accepted. The numbers are
// part of the protocol.
type NakCode uint16

const (
	_                  NakCode = iota
	NakPosMismatch             // the record does not begin where the peer stands: see Nak.Pos
	NakUnknownHistory          // the peer does not have this history, or has another as current
	NakUnknownDatabase         // the peer does not have this database
	NakEpoch                   // the epoch is over, or was never granted
	NakChecksum                // the checksum after apply is not the one promised
	NakCorrupt                 // the payload is not a valid LTX file, or not the one announced
	NakTooLarge                // beyond what the peer takes
	NakRefused                 // not allowed, or on hold: trying again cannot help
	NakBusy                    // no space or no resources now: try again after RetryAfter
	NakNeedSnapshot            // only a snapshot can help
	NakCanceled                // the group or stream was given up
	nakN
)

var nakText = [nakN]string{"", "position mismatch", "unknown history", "unknown database", "epoch over",
	"checksum mismatch", "corrupt record", "too large", "refused", "busy", "need snapshot", "canceled"}

func (c NakCode) String() string {
	if c > 0 && c < nakN {
		return nakText[c]
	}
	return fmt.Sprintf("nak %d", uint16(c))
}
