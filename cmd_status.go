package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/litefs-agent/litefs-agent/internal/config"
	"github.com/litefs-agent/litefs-agent/internal/control"
)

// watchEvery is how often status --watch looks.
const watchEvery = time.Second

func newStatus(a *app) *cobra.Command {
	var watch bool
	var checkText string
	cmd := a.jsonFlag(&cobra.Command{
		Use:   "status",
		Short: "print what is mounted, connected, written, acked, lagging",
		Long: `status prints the state of the node or hub. Exit status 1 when it is not healthy
or no service answers. Healthy means: mounted, log writable, no database fenced or
on hold, backlog within its budget. A hub out of reach is healthy unless --check
says otherwise:

  max-lag=TIME      no database lags more, nor was the hub last heard longer ago
  max-backlog=SIZE  what the hub lacks of all databases together`,
		Example: "  litefs-agent status --check max-lag=30s,max-backlog=10MiB",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			checks, err := parseChecks(checkText)
			if err != nil {
				return usageError{err}
			}
			client := a.client()
			for {
				healthy, err := a.printStatus(cmd.Context(), client, checks, watch)
				if !watch {
					if err == nil && !healthy {
						err = exitError(exitFailed)
					}
					return err
				}
				if err != nil {
					fmt.Fprintf(a.stderr, "litefs-agent: %v\n", err)
				}
				select {
				case <-cmd.Context().Done():
					return nil
				case <-time.After(watchEvery):
				}
			}
		},
	})
	cmd.Flags().BoolVar(&watch, "watch", false, "print again every second, until interrupted")
	cmd.Flags().StringVar(&checkText, "check", "", "further `CHECKS` of health: max-lag=30s,max-backlog=10MiB")
	return cmd
}

// printStatus asks once and prints. It reports whether the service is healthy
// and the checks hold.
func (a *app) printStatus(ctx context.Context, client *control.Client, checks statusChecks, watch bool) (bool, error) {
	raw, err := client.Status(ctx)
	if err != nil {
		return false, err
	}
	state, err := parseStatus(raw)
	if err != nil {
		return false, err
	}
	problems := checks.problems(state)
	healthy := state.healthy && len(problems) == 0
	switch {
	case a.json && watch:
		_, err = fmt.Fprintf(a.stdout, "%s\n", raw) // the service sends it in one line
	case a.json:
		err = printJSON(a.stdout, raw)
	default:
		var text strings.Builder
		if watch && isTerminal(a.stdout) {
			text.WriteString("\x1b[H\x1b[2J") // home, clear
		}
		state.print(&text, problems, time.Now())
		if watch {
			text.WriteByte('\n')
		}
		_, err = io.WriteString(a.stdout, text.String())
	}
	if a.json {
		for _, problem := range problems {
			fmt.Fprintf(a.stderr, "litefs-agent: not healthy: %s\n", problem)
		}
	}
	return healthy, err
}

func isTerminal(w io.Writer) bool {
	file, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(file.Fd()), unix.TCGETS)
	return err == nil
}

// serviceState is a status of either role: the one that is not there is nil.
type serviceState struct {
	healthy bool
	node    *control.StatusNode
	hub     *control.StatusHub
}

func parseStatus(raw json.RawMessage) (serviceState, error) {
	var common struct {
		Role    string `json:"role"`
		Healthy bool   `json:"healthy"`
	}
	if err := json.Unmarshal(raw, &common); err != nil {
		return serviceState{}, fmt.Errorf("status: %w", err)
	}
	state := serviceState{healthy: common.Healthy}
	var into any
	switch common.Role {
	case "node":
		state.node = new(control.StatusNode)
		into = state.node
	case "hub":
		state.hub = new(control.StatusHub)
		into = state.hub
	default:
		return serviceState{}, fmt.Errorf("status: unknown role %q", common.Role)
	}
	if err := json.Unmarshal(raw, into); err != nil {
		return serviceState{}, fmt.Errorf("status: %w", err)
	}
	return state, nil
}

// databases returns all databases, a hub's with those of its nodes.
func (s serviceState) databases() []control.StatusDatabase {
	if s.node != nil {
		return s.node.Databases
	}
	list := append([]control.StatusDatabase(nil), s.hub.Databases...)
	for _, node := range s.hub.Nodes {
		for _, database := range node.Databases {
			database.Name = "nodes/" + node.ID + "/" + database.Name
			list = append(list, database)
		}
	}
	return list
}

// statusChecks are what --check asks for; nil: not asked.
type statusChecks struct {
	maxLag     *config.Duration
	maxBacklog *config.Size
}

func parseChecks(text string) (statusChecks, error) {
	var checks statusChecks
	if text == "" {
		return checks, nil
	}
	for _, check := range strings.Split(text, ",") {
		name, value, _ := strings.Cut(check, "=")
		var err error
		switch name {
		case "max-lag":
			checks.maxLag = new(config.Duration)
			err = checks.maxLag.UnmarshalText([]byte(value))
		case "max-backlog":
			checks.maxBacklog = new(config.Size)
			err = checks.maxBacklog.UnmarshalText([]byte(value))
		default:
			err = fmt.Errorf("must be max-lag=TIME or max-backlog=SIZE")
		}
		if err != nil {
			return checks, fmt.Errorf("--check %s: %w", check, err)
		}
	}
	return checks, nil
}

// problems says which checks do not hold. What is not known does not hold.
func (c statusChecks) problems(state serviceState) []string {
	var list []string
	if c.maxLag != nil {
		if link := state.link(); link != nil && link.State != control.LinkOff && link.State != control.LinkConnected {
			if link.LastHeardMS == nil {
				list = append(list, "the hub was never heard")
			} else if heard := millis(*link.LastHeardMS); heard > c.maxLag.Std() {
				list = append(list, fmt.Sprintf("the hub was last heard %s ago, above max-lag %s", age(heard), c.maxLag))
			}
		}
	}
	var backlog int64
	for _, database := range state.databases() {
		backlog += database.Backlog.Bytes
		if c.maxLag == nil {
			continue
		}
		if database.LagMS == nil {
			list = append(list, fmt.Sprintf("%s: lag not known", database.Name))
		} else if lag := millis(*database.LagMS); lag > c.maxLag.Std() {
			list = append(list, fmt.Sprintf("%s: lag %s, above max-lag %s", database.Name, age(lag), c.maxLag))
		}
	}
	if c.maxBacklog != nil && backlog > int64(*c.maxBacklog) {
		list = append(list, fmt.Sprintf("backlog %s, above max-backlog %s", bytesText(backlog), c.maxBacklog))
	}
	return list
}

func (s serviceState) link() *control.StatusLink {
	if s.node == nil {
		return nil
	}
	return &s.node.Hub
}

// print writes the state for people.
func (s serviceState) print(w io.Writer, problems []string, now time.Time) {
	var role, id, version string
	var site *string
	var mount control.StatusMount
	var card control.StatusCard
	var memory control.StatusMemory
	var own []string // problems that the service names itself
	if s.node != nil {
		role, id, version, site = s.node.Role, s.node.ID, s.node.Version, s.node.Site
		mount, card, memory, own = s.node.Mount, s.node.Card, s.node.Memory, s.node.Problems
	} else {
		role, id, version, site = s.hub.Role, s.hub.ID, s.hub.Version, s.hub.Site
		mount, card, memory, own = s.hub.Mount, s.hub.Card, s.hub.Memory, s.hub.Problems
	}
	health := "healthy"
	if !s.healthy || len(problems) > 0 {
		health = "NOT HEALTHY"
	}
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(table, "%s\t%s, %s\n", role, id, health)
	for _, problem := range slices.Concat(own, problems) {
		fmt.Fprintf(table, "problem\t%s\n", problem)
	}
	fmt.Fprintf(table, "site\t%s\n", orDash(site))
	if link := s.link(); link != nil {
		fmt.Fprintf(table, "hub\t%s\n", linkText(link, now))
	}
	fmt.Fprintf(table, "mount\t%s %s\n", mount.Dir, mount.State)
	fmt.Fprintf(table, "card\t%d transactions, %d flushes, %s written\n", card.Transactions, card.Fdatasyncs, bytesText(card.BytesWritten))
	fmt.Fprintf(table, "program\t%s, %s of memory\n", version, bytesText(memory.RSS))
	table.Flush()

	if s.hub != nil && len(s.hub.Nodes) > 0 {
		fmt.Fprintln(w)
		table = tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
		fmt.Fprintln(table, "NODE\tSTATE\tLAST SEEN\tVERSION\tDATABASES")
		for _, node := range s.hub.Nodes {
			fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%d\n", node.ID, node.State, agoText(node.LastSeen, now), orDash(node.Version), len(node.Databases))
		}
		table.Flush()
	}
	if databases := s.databases(); len(databases) > 0 {
		fmt.Fprintln(w)
		printDatabases(w, databases, now)
	}
}

func printDatabases(w io.Writer, databases []control.StatusDatabase, now time.Time) {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "DATABASE\tROLE\tWRITER\tTXID\tACKED\tBACKLOG\tLAG\tSIZE\tMODE\tLAST COMMIT\tBRANCHES")
	for _, d := range databases {
		lag := "-"
		if d.LagMS != nil {
			lag = age(millis(*d.LagMS))
		}
		size := "-"
		if d.Size != nil {
			size = bytesText(*d.Size)
		}
		backlog := "0"
		if d.Backlog.Records > 0 {
			backlog = fmt.Sprintf("%d (%s)", d.Backlog.Records, bytesText(d.Backlog.Bytes))
		}
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%d\n", d.Name, d.Role, orDash(d.Writer),
			txidText(d.Pos), txidText(d.Acked), backlog, lag, size, orDash(d.JournalMode), agoText(d.LastCommit, now), len(d.Branches))
	}
	table.Flush()
}

func linkText(link *control.StatusLink, now time.Time) string {
	if link.State == control.LinkOff {
		return "none, stands alone"
	}
	text := orDash(link.URL) + " " + link.State
	if link.LastHeardMS != nil {
		text += ", heard " + age(millis(*link.LastHeardMS)) + " ago"
	} else {
		text += ", never heard"
	}
	if link.Error != nil {
		text += ": " + *link.Error
	}
	if link.RetryAt != nil {
		text += ", next try in " + age(max(link.RetryAt.Sub(now), 0))
	}
	return text
}

func orDash(text *string) string {
	if text == nil {
		return "-"
	}
	return *text
}

// txidText is the transaction of a position, without leading zeros for people.
func txidText(pos *string) string {
	if pos == nil {
		return "-"
	}
	txid, _, _ := strings.Cut(*pos, "/")
	if txid = strings.TrimLeft(txid, "0"); txid == "" {
		return "0"
	}
	return txid
}

func millis(ms int64) time.Duration { return time.Duration(ms) * time.Millisecond }

func agoText(t *time.Time, now time.Time) string {
	if t == nil {
		return "-"
	}
	return age(max(now.Sub(*t), 0)) + " ago"
}

// age is a duration with two significant units at most.
func age(d time.Duration) string {
	switch {
	case d < time.Second:
		return d.Round(time.Millisecond).String()
	case d < time.Minute:
		return d.Round(100 * time.Millisecond).String()
	case d < 24*time.Hour:
		return config.Duration(d.Round(time.Second)).String()
	}
	return fmt.Sprintf("%dd%dh", int(d.Hours())/24, int(d.Hours())%24)
}

// bytesText is a size with three digits or so.
func bytesText(n int64) string {
	size, unit := float64(n), 0
	for size >= 1024 && unit < 4 {
		size /= 1024
		unit++
	}
	if unit == 0 {
		return fmt.Sprintf("%dB", n)
	}
	return fmt.Sprintf("%.1f%ciB", size, "KMGT"[unit-1])
}
