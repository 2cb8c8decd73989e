module github.com/litefs-agent/litefs-agent/bench

go 1.26.0

require (
	github.com/hanwen/go-fuse/v2 v2.11.0
	github.com/mattn/go-sqlite3 v1.14.53
	golang.org/x/sys v0.49.0
)
