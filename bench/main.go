// Command bench measures SQLite on the mount of litefs-agent next to plain ext4,
// in turn in one run, and prints one Markdown table. See README.md in this folder.
//
// It is a module of its own, since it needs cgo and SQLite.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	err := run(ctx, os.Args[1:])
	stop()
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// A plan is what to measure and how long.
type plan struct {
	agent, lean string        // the binary, and the one built with tag nohub
	work        string        // folder for images, data and mounts; on the disk to measure
	results     string        // folder for raw rows and tables
	device      string        // disk | loop | slow
	flush       time.Duration // of a slow device
	rounds      int
	pairs       int           // pairs of blocks a round
	block       time.Duration // length of one block
	traceN      int           // transactions under strace
	bytesN      int           // transactions between two looks at the device
	dbMB        int           // size of the database of reads, scans and starts
	idle        time.Duration // how long context switches are counted
	long        bool          // bytes until the log's ring has turned twice
	parts       []string
	only        string
	command     string // as the user gave it, for the table
}

// has reports whether a part was asked for.
func (p *plan) has(part string) bool {
	for _, one := range p.parts {
		if one == part {
			return true
		}
	}
	return false
}

func run(ctx context.Context, args []string) error {
	if len(args) > 0 && args[0] == "work" {
		return work(os.Stdin, os.Stdout)
	}
	if len(args) == 4 && args[0] == "slowflush" {
		return slowFlush(ctx, args[1], args[2], args[3])
	}
	if len(args) > 1 && args[0] == "table" {
		return printTables(args[1:])
	}
	var p plan
	var quick, slow, big bool
	var parts string
	fs := flag.NewFlagSet("bench", flag.ContinueOnError)
	fs.StringVar(&p.agent, "agent", "", "the agent's `binary` (required)")
	fs.StringVar(&p.lean, "lean", "", "the same built with tag nohub, for memory and starts (default: -agent)")
	fs.StringVar(&p.work, "work", "", "`folder` on the disk to measure (required); emptied")
	fs.StringVar(&p.results, "results", "results", "`folder` of the raw rows and tables")
	fs.IntVar(&p.rounds, "rounds", 5, "rounds")
	fs.StringVar(&p.device, "device", "disk", "speed on: disk (folders), loop (two ext4 images), slow (as -slow)")
	fs.BoolVar(&slow, "slow", false, "measure on devices whose flush takes -flush")
	fs.DurationVar(&p.flush, "flush", 5*time.Millisecond, "how long a flush of a slow device takes")
	fs.BoolVar(&quick, "quick", false, "a short look: small numbers, noisy figures")
	fs.BoolVar(&big, "big", false, "memory and starts with a database of 1 GB")
	fs.BoolVar(&p.long, "long", false, "also bytes until the log's ring has turned twice")
	fs.StringVar(&parts, "parts", "", "of speed,read,bytes,trace,process (default: all; with -slow: speed,trace)")
	fs.StringVar(&p.only, "only", "", "only rows whose name contains this")
	fs.StringVar(&p.command, "command", "", "command line to print above the table")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if p.agent == "" || p.work == "" || fs.NArg() > 0 {
		return errors.New("-agent and -work are required; see -h")
	}
	if os.Geteuid() != 0 {
		return errors.New("loop devices, strace and drop_caches need root: run it with sudo")
	}
	if slow {
		p.device = "slow"
	}
	if p.lean == "" {
		p.lean = p.agent
	}
	p.pairs, p.block, p.traceN, p.bytesN, p.dbMB, p.idle = 4, 250*time.Millisecond, 100, 2000, 100, time.Minute
	if p.device == "slow" {
		p.pairs, p.block = 2, time.Second
	}
	if quick {
		p.pairs, p.block, p.traceN, p.bytesN, p.idle = 2, 100*time.Millisecond, 20, 200, 5*time.Second
	}
	if big {
		p.dbMB = 1000
	}
	switch {
	case parts != "":
		p.parts = strings.Split(parts, ",")
	case p.device == "slow":
		p.parts = []string{"speed", "trace"}
	default:
		p.parts = []string{"speed", "read", "bytes", "trace", "process"}
	}
	for _, path := range []*string{&p.agent, &p.lean, &p.work, &p.results} {
		abs, err := filepath.Abs(*path)
		if err != nil {
			return err
		}
		*path = abs
	}
	return p.measure(ctx)
}
