// Command litefs-agent is a node, a hub, and the commands that talk to them.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/litefs-agent/litefs-agent/internal/config"
	"github.com/litefs-agent/litefs-agent/internal/control"
)

// The exit statuses, besides that of the program under 'mount --'.
const (
	exitDone   = 0
	exitFailed = 1 // also: not healthy, timed out, not verified
	exitUsage  = 2
)

func main() { os.Exit(run(context.Background(), os.Args[1:], os.Stdout, os.Stderr)) }

// run is the program: results go to stdout, everything else to stderr. ctx ends
// a service like SIGTERM.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	a := &app{stdout: stdout, stderr: stderr, env: os.LookupEnv}
	root := newRoot(a)
	root.SetArgs(args)
	cmd, err := root.ExecuteContextC(ctx)
	var usage usageError
	var exit exitError
	switch {
	case err == nil:
		return exitDone
	case errors.As(err, &exit):
		return int(exit)
	case !a.started || errors.As(err, &usage):
		fmt.Fprintf(stderr, "litefs-agent: %v\nTry '%s --help'.\n", err, cmd.CommandPath())
		return exitUsage
	}
	fmt.Fprintf(stderr, "litefs-agent: %v\n", err)
	return exitFailed
}

// A usageError says that the command line itself is wrong.
type usageError struct{ error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// An exitError ends the program with that status and says nothing more.
type exitError int

func (e exitError) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// app is what the commands share.
type app struct {
	stdout, stderr io.Writer
	env            config.LookupEnv

	started bool   // set once flags and arguments were accepted
	socket  string // --socket
	json    bool   // --json, where the command has it
}

// newRoot makes the whole tree of commands.
func newRoot(a *app) *cobra.Command {
	root := &cobra.Command{
		Use:   "litefs-agent",
		Short: "replicate SQLite databases from small boards to a hub",
		Long: `litefs-agent mounts a file system in which any program's SQLite databases are
recorded transaction by transaction, and ships the records to a hub whenever it
can be reached.

Exit status: 0 done, 1 failed or not healthy, 2 used wrongly.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			fmt.Fprint(a.stderr, cmd.UsageString())
			return exitError(exitUsage)
		},
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.SetOut(a.stdout)
	root.SetErr(a.stderr)
	root.PersistentFlags().StringVar(&a.socket, "socket", "",
		"control `PATH` of the service to talk to (default "+control.NodeSocket+", else "+control.HubSocket+")")
	root.AddCommand(newMount(a), newJoin(a), newStatus(a), newWait(a), newExport(a), newImport(a), newVerify(a), newEvents(a), newLTX(a), newConfig(a), newVersion(a), newWatch(a))
	addHub(a, root)
	a.markStarted(root)
	return root
}

// markStarted wraps every command so that what fails before it runs counts as
// used wrongly.
func (a *app) markStarted(cmd *cobra.Command) {
	if runE := cmd.RunE; runE != nil {
		cmd.RunE = func(cmd *cobra.Command, args []string) error {
			a.started = true
			return runE(cmd, args)
		}
	}
	for _, sub := range cmd.Commands() {
		a.markStarted(sub)
	}
}

// group makes a command that has only subcommands.
func group(use, short string, subs ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{
		Use:   use,
		Short: short,
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return usagef("which %s command?", cmd.Name()) },
	}
	cmd.AddCommand(subs...)
	return cmd
}

// jsonFlag gives cmd the flag --json.
func (a *app) jsonFlag(cmd *cobra.Command) *cobra.Command {
	cmd.Flags().BoolVar(&a.json, "json", false, "print JSON")
	return cmd
}

// dbFlag gives cmd the flag --db.
func dbFlag(cmd *cobra.Command, db *string, required bool) *cobra.Command {
	cmd.Flags().StringVar(db, "db", "", "`NAME` of the database: its path below the mount")
	if required {
		must(cmd.MarkFlagRequired("db"))
	}
	return cmd
}

// must is for errors that only a mistake in this program's text can cause.
func must(err error) {
	if err != nil {
		panic(err)
	}
}

// client returns a client of the service that --socket names, else of the
// node's, else of the hub's.
func (a *app) client() *control.Client {
	socket := a.socket
	if socket == "" {
		socket = control.NodeSocket
		if !exists(control.NodeSocket) && exists(control.HubSocket) {
			socket = control.HubSocket
		}
	}
	return control.NewClient(socket)
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}
