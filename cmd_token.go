//go:build !nohub

package main

import (
	"errors"
	"fmt"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/litefs-agent/litefs-agent/hub"
)

// newToken makes 'hub token'. The commands edit the file: the hub need not run,
// and where it runs it notices.
func newToken(a *app) *cobra.Command {
	var file string
	var keepNewest bool
	open := func() (hub.TokenFile, hub.Config, error) {
		cfg, err := hub.LoadConfig(file, a.env)
		if err == nil && cfg.Auth.Tokens == "" {
			err = errors.New("[auth] tokens is empty: set it to the file that is to hold them")
		}
		return hub.TokenFile{Path: cfg.Auth.Tokens, Owner: cfg.Hub.Data}, cfg, err
	}
	add := &cobra.Command{
		Use:   "add NODE",
		Short: "make a token for a node and print it",
		Long: `add makes a token, with which a node is NODE, and prints it, once: the hub keeps
only its hash. The tokens that NODE has already stay good. A hub that runs takes it
at once.`,
		Example: "  litefs-agent join https://hub.example:20202 $(ssh hub litefs-agent hub token add pi-kitchen)",
		Args:    cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			tokens, cfg, err := open()
			if err != nil {
				return err
			}
			if args[0] == cfg.Hub.ID {
				return fmt.Errorf("%q is the hub's own id: a node needs another", args[0])
			}
			text, err := tokens.Add(args[0])
			if err != nil {
				return err
			}
			_, err = fmt.Fprintln(a.stdout, text)
			return err
		},
	}
	list := a.jsonFlag(&cobra.Command{
		Use:   "list",
		Short: "print which nodes have tokens, and since when",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			tokens, _, err := open()
			if err != nil {
				return err
			}
			list, err := tokens.List()
			if err != nil {
				return err
			}
			return a.printTokens(list)
		},
	})
	revoke := &cobra.Command{
		Use:   "revoke NODE",
		Short: "take a node's tokens away; its session ends",
		Args:  cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			tokens, _, err := open()
			if err != nil {
				return err
			}
			n, err := tokens.Revoke(args[0], keepNewest)
			if err == nil {
				fmt.Fprintf(a.stderr, "%d token(s) of %s revoked\n", n, args[0])
			}
			return err
		},
	}
	revoke.Flags().BoolVar(&keepNewest, "keep-newest", false, "all but the one made last, after a change of token")
	cmd := group("token", "the nodes' tokens", add, list, revoke)
	cmd.PersistentFlags().StringVar(&file, "config", "", "the hub's configuration `FILE` (default "+hub.ConfigFile+")")
	return cmd
}

func (a *app) printTokens(list []hub.Token) error {
	if a.json {
		type token struct {
			Node string    `json:"node"`
			Made time.Time `json:"made"`
		}
		out := []token{}
		for _, t := range list {
			out = append(out, token{t.Node, t.Made})
		}
		return printJSON(a.stdout, out)
	}
	table := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "NODE\tMADE")
	for _, t := range list {
		fmt.Fprintf(table, "%s\t%s\n", t.Node, t.Made.Format(time.RFC3339))
	}
	return table.Flush()
}
