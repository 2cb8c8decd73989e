package e2e

import (
	"fmt"
	"os"
	"sync"
	"testing"

	"github.com/litefs-agent/litefs-agent/internal/testrig"
)

// Once close(2) of a copied database has returned, NAME-pos is there, although the
// kernel tells of the release later.
func TestPositionAfterClose(t *testing.T) {
	env := testrig.New(t)
	node := env.Node(testrig.Options{})
	content, err := os.ReadFile(makeDB(env, "one", 10))
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for w := range 8 { // so many that the kernel's word of a release often comes late
		wg.Go(func() {
			for i := range 40 * *soak {
				path := node.Path(fmt.Sprintf("%d-%d.db", w, i))
				if err := os.WriteFile(path, content, 0o660); err != nil {
					t.Error(err)
					return
				}
				if _, err := os.Stat(path + "-pos"); err != nil {
					t.Errorf("copy %d of %d: %v", i, w, err)
				}
			}
		})
	}
	wg.Wait()
}
