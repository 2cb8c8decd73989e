// Package sabotage switches rules that keep data safe off, one at a time, so that
// 'make sabotage' can prove that the tests notice. Only a build with the tag
// "sabotage" can do so: in every other one On is the constant false, and the
// compiler removes what it guards.
package sabotage

// A Rule is something that the engine does to keep its promise. What each one
// means and which test notices is in internal/tools/sabotage.
type Rule string

// The rules, by the invariant of ARCHITECTURE.md that they keep.
const (
	AppendBeforeReply   Rule = "append-before-reply"   // 1
	Flush               Rule = "flush"                 // 2
	PrepareDurable      Rule = "prepare-durable"       // 2
	WALSyncDurable      Rule = "wal-sync-durable"      // 2
	LogBeforeData       Rule = "log-before-data"       // 3
	OverlayOnly         Rule = "overlay-only"          // 4
	BaseSynced          Rule = "base-synced"           // 5
	MetaDurable         Rule = "meta-durable"          // 5
	ShipDurable         Rule = "ship-durable"          // 5
	SentMark            Rule = "sent-mark"             // 5
	AckDurable          Rule = "ack-durable"           // 5
	CheckpointVersion   Rule = "checkpoint-version"    // 6
	BaseBeforeReuse     Rule = "base-before-reuse"     // 7
	LevelSynced         Rule = "level-synced"          // 7
	SideSynced          Rule = "side-synced"           // 7
	OneTentative        Rule = "one-tentative"         // 8
	TentativeUntilKnown Rule = "tentative-until-known" // 8
	AbortLogged         Rule = "abort-logged"          // 9
	Refute              Rule = "refute"                // 9
	SumsOfTheGone       Rule = "sums-of-the-gone"      // 10
	HolesNamed          Rule = "holes-named"           // 11
	GroupWhole          Rule = "group-whole"           // 12
	ErrorHonoured       Rule = "error-honoured"        // 13
	FailedFileLeft      Rule = "failed-file-left"      // 14
	RecordChecksum      Rule = "record-checksum"       // 15
	Chain               Rule = "chain"                 // 15
	HoleReported        Rule = "hole-reported"         // 15
	BlockSealed         Rule = "block-sealed"          // 16
	InodesKept          Rule = "inodes-kept"           // 17
	LockHeld            Rule = "lock-held"             // 18
	WrittenBeforeGone   Rule = "written-before-gone"   // 19
	ReadWithoutLock     Rule = "read-without-lock"     // 20
	FileSynced          Rule = "file-synced"           // 21
	Budget              Rule = "budget"                // 22
	Reserve             Rule = "reserve"               // 23
	SizeAtStart         Rule = "size-at-start"         // 24
	NothingNothing      Rule = "nothing-nothing"       // 25
	BranchKept          Rule = "branch-kept"           // nothing is lost
	OldLineForgotten    Rule = "old-line-forgotten"    // nothing is lost
)
