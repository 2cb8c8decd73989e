package main

import (
	"os"

	"github.com/spf13/cobra"
)

func newImport(a *app) *cobra.Command {
	var db string
	return dbFlag(&cobra.Command{
		Use:   "import --db NAME FILE",
		Short: "make an SQLite file the content of a database",
		Long: `import makes FILE, a whole SQLite database without a journal or WAL beside it,
the content of the database NAME, as one transaction: programs see the old or
the new content, and TXIDs go on. A database that is not there is made. It waits
some seconds for programs that use the database; one in WAL mode must be closed
by them.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			f, err := os.Open(args[0])
			if err != nil {
				return err
			}
			defer f.Close()
			return a.client().Import(cmd.Context(), db, f)
		},
	}, &db, true)
}
