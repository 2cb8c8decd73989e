package main

import sab "github.com/litefs-agent/litefs-agent/internal/sabotage"

// packages are where the tests are, by a short name.
var packages = map[string]string{"store": "store", "commitlog": "internal/commitlog", "hub": "hub"}

// soak is the crash test of the engine. Below 5,000 points it does not ask that
// everything was met, which a rule that is missing may prevent.
var soak = test{"store", "TestCrashSoak", []string{"-store.points=4900"}}

// A rule is one that can be switched off, and the test that must notice.
type rule struct {
	rule      sab.Rule
	invariant string
	by        test
}

var rules = []rule{
	// A record that nobody waits for is in the page cache before the reply: here it
	// stays in memory.
	{sab.AppendBeforeReply, "1", soak},
	// fdatasync of the log before the reply: here it does nothing.
	{sab.Flush, "2", test{"store", "TestCutLosesNothingDurable", nil}},
	// FSYNC of the database waits for the prepared record: here it does not.
	{sab.PrepareDurable, "2", soak},
	// FSYNC of the WAL waits for the tentative record: here it does not.
	{sab.WALSyncDurable, "2", soak},
	// Log before data: here committed pages go to the file at once.
	{sab.LogBeforeData, "3", soak},
	// What is not committed is in the overlay: here it is in the file, too.
	{sab.OverlayOnly, "4", soak},
	// The file is synced before base moves: here it is not.
	{sab.BaseSynced, "5", soak},
	// The metadata names what is durable of the log: here all of it.
	{sab.MetaDurable, "5", test{"store", "TestMetadataNamesDurableRecords", nil}},
	// Only durable records are shipped: here all.
	{sab.ShipDurable, "5", soak},
	// What is handed to a link is marked in the log: here only in memory.
	{sab.SentMark, "5", soak},
	// The hub acks after its fdatasync: here before.
	{sab.AckDurable, "5", test{"hub", "TestAckOutlivesPowerCut", nil}},
	// A checkpoint writes versions of this WAL: here anything.
	{sab.CheckpointVersion, "6", soak},
	// A segment is given up after the bases moved: here before.
	{sab.BaseBeforeReuse, "7", soak},
	// A level file is synced before it counts: here it is not.
	{sab.LevelSynced, "7", soak},
	// A large transaction's file is synced before its reference: here it is not.
	{sab.SideSynced, "7", soak},
	// A tentative record is resolved before the next one: here it is forgotten.
	{sab.OneTentative, "8", soak},
	// A WAL commit counts once it is published: here at its commit frame.
	{sab.TentativeUntilKnown, "8", test{"store", "TestWALCommitNeverPublished", nil}},
	// What is taken back has an abort record: here one that nobody heeds.
	{sab.AbortLogged, "9", soak},
	// Frames that are written over take their record back: here they do not.
	{sab.Refute, "9", test{"store", "TestWALCommitNeverPublished", nil}},
	// A shrink takes the checksums of pages out of that of the database: here not.
	{sab.SumsOfTheGone, "10", soak},
	// A growing record names every page: here only those that were written.
	{sab.HolesNamed, "11", soak},
	// Members of a group are in the log by the group's record alone: here each is
	// prepared by itself.
	{sab.GroupWhole, "12", soak},
	// An error at the commit event is the program's: here the journal goes.
	{sab.ErrorHonoured, "13", soak},
	// After a failed fdatasync the file is left: here another one is believed.
	{sab.FailedFileLeft, "14", soak},
	// A record's CRC is checked: here it is not.
	{sab.RecordChecksum, "15", soak},
	// A record names the CRC of the one before, and its segment has a salt: here
	// neither counts.
	{sab.Chain, "15", test{"commitlog", "TestCrash", nil}},
	// A hole before a later batch is reported: here it is cut as a torn tail.
	{sab.HoleReported, "15", test{"commitlog", "TestDamageInTheLastSegment", nil}},
	// A flush seals the block that it ends in: here the next record joins it.
	{sab.BlockSealed, "16", soak},
	// Inode numbers are reserved in a file: here they start again.
	{sab.InodesKept, "17", soak},
	// A commit needs RESERVED: here nobody is asked.
	{sab.LockHeld, "18", soak},
	// A page leaves its layer after its write: here also if that failed.
	{sab.WrittenBeforeGone, "19", soak},
	// A read takes no lock held over a disk wait: here that of the flusher.
	{sab.ReadWithoutLock, "20", test{"store", "TestReadWaitsForNoDisk", nil}},
	// FSYNC of an ordinary file is one: here it does nothing.
	{sab.FileSynced, "21", soak},
	// Memory is within the budget: here it grows.
	{sab.Budget, "22", soak},
	// Room is reserved when SQLite writes: here it is not.
	{sab.Reserve, "23", soak},
	// A start cuts files to the committed size: here it does not.
	{sab.SizeAtStart, "24", soak},
	// A transaction that changes nothing makes no record: here it does.
	{sab.NothingNothing, "25", soak},
	// A line that another replaces is kept: here it is not.
	{sab.BranchKept, "none lost", soak},
	// Records of a line that was replaced mean nothing: here they count.
	{sab.OldLineForgotten, "none lost", soak},
}
