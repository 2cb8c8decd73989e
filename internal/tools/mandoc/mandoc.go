// Package mandoc writes man pages of a tree of commands. It is a package of its
// own so that the product does not hold what it needs for that.
package mandoc

import (
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

// Write writes a page of section 1 for root and each command below it into dir,
// which it makes. date is printed on them.
func Write(root *cobra.Command, dir string, date time.Time) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	root.InitDefaultCompletionCmd()
	root.DisableAutoGenTag = true
	name := strings.ToUpper(root.Name())
	return doc.GenManTree(root, &doc.GenManHeader{Title: name, Section: "1", Source: root.Name(), Manual: root.Name(), Date: &date}, dir)
}
