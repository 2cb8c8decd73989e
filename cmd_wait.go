package main

import (
	"time"

	"github.com/spf13/cobra"

	"github.com/litefs-agent/litefs-agent/ltx"
)

func newWait(a *app) *cobra.Command {
	var db, txidText string
	var acked bool
	var timeout time.Duration
	cmd := dbFlag(&cobra.Command{
		Use:   "wait --db NAME [flags]",
		Short: "wait until a database has reached a position, or the hub has it",
		Long: `wait returns when the database has reached a transaction here, or with --acked
when the hub has made it durable. Without --txid it is the last one at the
command's start. Exit status 1 where the time-out came first.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var txid ltx.TXID
			if txidText != "" {
				var err error
				if txid, err = ltx.ParseTXID(txidText); err != nil || txid == 0 {
					return usagef("--txid %q: must be 16 lower-case hex digits, above 0", txidText)
				}
			}
			if timeout < 0 || timeout == 0 && cmd.Flags().Changed("timeout") {
				return usagef("--timeout: must be above 0")
			}
			return a.client().Wait(cmd.Context(), db, txid, acked, timeout)
		},
	}, &db, true)
	cmd.Flags().StringVar(&txidText, "txid", "", "transaction to wait for (default: the last one now)")
	cmd.Flags().BoolVar(&acked, "acked", false, "wait until the hub has made it durable")
	cmd.Flags().DurationVar(&timeout, "timeout", 0, "longest `TIME` to wait, such as 10s (default: for ever)")
	return cmd
}
