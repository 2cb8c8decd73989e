package main

import (
	"fmt"
	"strings"
)

// A testRow is one line of the table.
type testRow struct {
	name  string
	kind  string // tx | read | scan-cold | scan-warm | mixed
	mode  string // journal mode
	sync  string // synchronous
	batch int    // rows a transaction
	conns int    // connections that read
	unit  string
	goal  map[string]float64 // times ext4, by device: disk, slow
}

// goals are the rates that the project aims at, as multiples of ext4's: on a disk,
// and on one whose flush takes 5 ms. They are shown, not checked.
var goals = map[string][2]float64{
	"DELETE FULL": {1.4, 3.3}, "TRUNCATE FULL": {1.4, 5}, "PERSIST FULL": {1.2, 5},
	"DELETE NORMAL": {1.2, 2.6}, "TRUNCATE NORMAL": {1.2, 2.6}, "PERSIST NORMAL": {1.2, 2.6},
	"WAL FULL": {0.8, 0.95}, "WAL NORMAL": {0.2, 0.2},
	"DELETE FULL, 100 rows": {1.1, 4}, "WAL FULL, 100 rows": {0.45, 1},
	"point reads, DELETE, 1 connection": {0.95}, "point reads, DELETE, 4 connections": {0.95},
	"point reads, WAL, 1 connection": {0.95}, "point reads, WAL, 4 connections": {0.95},
	"cold scan, DELETE": {0.7}, "cold scan, WAL": {0.7}, "warm scan, DELETE": {0.95}, "warm scan, WAL": {0.95},
	mixedName + ": writes": {0.2}, mixedName + ": reads": {0.95},
}

const mixedName = "WAL, 1 writer and 4 readers"

func goal(device, name string) (float64, bool) {
	g := goals[name]
	if device == "slow" {
		return g[1], g[1] != 0
	}
	return g[0], g[0] != 0
}

// writeRows are the rows of the parts speed, bytes and trace.
func writeRows() (rows []testRow) {
	for _, batch := range []int{1, 100} {
		for _, mode := range []string{"DELETE", "TRUNCATE", "PERSIST", "WAL"} {
			for _, level := range []string{"FULL", "NORMAL"} {
				row := testRow{name: mode + " " + level, kind: "tx", mode: mode, sync: level, batch: batch, unit: "tx/s"}
				if batch > 1 {
					row.name += fmt.Sprintf(", %d rows", batch)
				}
				rows = append(rows, row)
			}
		}
	}
	return rows
}

// readRows are the rows of the part read.
func readRows() (rows []testRow) {
	for _, mode := range []string{"DELETE", "WAL"} {
		for _, conns := range []int{1, 4} {
			name := fmt.Sprintf("point reads, %s, %d connection", mode, conns)
			if conns > 1 {
				name += "s"
			}
			rows = append(rows, testRow{name: name, kind: "read", mode: mode, sync: "NORMAL", conns: conns, unit: "reads/s"})
		}
	}
	for _, kind := range []string{"cold", "warm"} {
		for _, mode := range []string{"DELETE", "WAL"} {
			rows = append(rows, testRow{name: kind + " scan, " + mode, kind: "scan-" + kind, mode: mode, sync: "NORMAL", conns: 1, unit: "MB/s"})
		}
	}
	return append(rows, testRow{name: mixedName, kind: "mixed", mode: "WAL", sync: "NORMAL", batch: 1, conns: 4, unit: "tx/s"})
}

// chosen are the rows whose name contains only.
func chosen(rows []testRow, only string) (out []testRow) {
	for _, row := range rows {
		if strings.Contains(row.name, only) {
			out = append(out, row)
		}
	}
	return out
}
