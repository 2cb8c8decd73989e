//go:build !nohub

package main

import (
	"fmt"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/litefs-agent/litefs-agent/internal/control"
)

func newNode(a *app) *cobra.Command {
	list := a.jsonFlag(&cobra.Command{
		Use:   "list",
		Short: "print the nodes: their sessions, hardware, and refused clones",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			nodes, err := a.hubClient().Nodes(cmd.Context())
			if err != nil {
				return err
			}
			if a.json {
				return printJSON(a.stdout, nodes)
			}
			return a.printNodes(nodes)
		},
	})
	var hardware string
	accept := &cobra.Command{
		Use:   "accept ID",
		Short: "let a refused clone, or a board that replaces another, go on as node ID",
		Long: `accept lets the card that was refused as a clone of ID go on as ID when it dials
next. What was ID until then is refused from then on. Both lines of its databases
are kept.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			_, err := a.hubClient().AcceptNode(cmd.Context(), args[0], hardware)
			if err == nil {
				fmt.Fprintf(a.stderr, "%s: accepted; it is taken when it dials next, at once if it is restarted\n", args[0])
			}
			return err
		},
	}
	accept.Flags().StringVar(&hardware, "hardware", "", "of several clones that on this `HARDWARE`, as node list shows it")
	return group("node", "the nodes of a hub: who they are", list, accept)
}

// hubClient returns a client of the service that --socket names, else of the hub.
func (a *app) hubClient() *control.Client {
	if a.socket == "" {
		return control.NewClient(control.HubSocket)
	}
	return a.client()
}

func (a *app) printNodes(nodes []control.NodeInfo) error {
	now := time.Now()
	table := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "NODE\tSTATE\tSESSION\tHARDWARE\tLAST SEEN\tADDRESS\tVERSION")
	for _, n := range nodes {
		session := "-"
		if n.Session != nil {
			session = fmt.Sprint(*n.Session)
		}
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", n.ID, n.State, session, orDash(n.Hardware), agoText(n.LastSeen, now), orDash(n.Addr), orDash(n.Version))
		for _, c := range n.Clones {
			state := "refused"
			if c.Accepted {
				state = "accepted"
			}
			fmt.Fprintf(table, "  clone\t%s\t%d\t%s\t%s\t%s\t\n", state, c.Session, c.Hardware, agoText(&c.Time, now), c.Addr)
		}
	}
	return table.Flush()
}
