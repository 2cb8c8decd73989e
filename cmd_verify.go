package main

import (
	"encoding/json"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/litefs-agent/litefs-agent/internal/control"
)

func newVerify(a *app) *cobra.Command {
	var db string
	return a.jsonFlag(dbFlag(&cobra.Command{
		Use:   "verify [--db NAME]",
		Short: "recompute the checksums of databases and records",
		Long: `verify reads every database and record that the service holds, or those of one
database, recomputes their checksums, and prints what it has looked at. Exit
status 1 where something does not hold.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var result control.Result
			var printErr error
			err := a.client().Verify(cmd.Context(), db, func(check control.Check) {
				result.Add(check)
				if printErr == nil {
					printErr = a.printCheck(check)
				}
			})
			if err == nil {
				err = printErr
			}
			if err != nil {
				return err
			}
			if a.json {
				err = json.NewEncoder(a.stdout).Encode(result.Final())
			} else {
				_, err = fmt.Fprintf(a.stdout, "%d checked, %d problems\n", result.Checked, result.Problems)
			}
			if err == nil && result.Problems > 0 {
				err = exitError(exitFailed)
			}
			return err
		},
	}, &db, false))
}

// printCheck prints a line for what was looked at; progress only as JSON.
func (a *app) printCheck(check control.Check) error {
	if a.json {
		return json.NewEncoder(a.stdout).Encode(check)
	}
	if check.InProgress() {
		return nil
	}
	verdict := "ok     "
	if !check.OK {
		verdict = "PROBLEM"
	}
	_, err := fmt.Fprintf(a.stdout, "%s %s %s %s", verdict, check.DB, check.Object, orDash(check.Pos))
	if err == nil && check.Problem != nil {
		_, err = fmt.Fprintf(a.stdout, ": %s", *check.Problem)
	}
	if err == nil {
		_, err = fmt.Fprintln(a.stdout)
	}
	return err
}
