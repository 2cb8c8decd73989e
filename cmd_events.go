package main

import (
	"encoding/json"
	"fmt"

	"github.com/spf13/cobra"
)

func newEvents(a *app) *cobra.Command {
	var db string
	return dbFlag(&cobra.Command{
		Use:   "events [--db NAME]",
		Short: "print what happens, as JSON lines, until interrupted",
		Long: `events prints a line of JSON for each thing that happens from now on:

  commit   a transaction; at a hub, one that arrived
  ack      the hub has made everything up to here durable
  link     the link has another state; at a hub that of a node
  branch   a line of transactions was kept when another replaced it
  lease    a lease has gone to another holder
  missed   so many events came while this reader was too slow

Each has "time" and "event", and "db", "txid" and "checksum", which are null where
it is of no database. Nobody waits for a slow reader: 1024 events are kept for it.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := stopContext(cmd.Context())
			defer stop()
			err := a.client().Events(ctx, db, nil, func(line json.RawMessage) error {
				_, err := fmt.Fprintf(a.stdout, "%s\n", line)
				return err
			})
			if ctx.Err() != nil {
				return nil
			}
			return err
		},
	}, &db, false)
}
