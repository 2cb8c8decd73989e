package fuse_test

import (
	"fmt"
	"path/filepath"
	"sync"
	"testing"

	"github.com/litefs-agent/litefs-agent/fuse"
)

func TestSQLite(t *testing.T) {
	for _, mode := range []string{"delete", "truncate", "persist", "wal"} {
		for _, mmap := range []int{0, 256 << 20} {
			t.Run(fmt.Sprintf("%s/mmap=%d", mode, mmap), func(t *testing.T) {
				_, dir := mountFS(t, newMemFS(), fuse.Options{})
				db := filepath.Join(dir, "app.db")
				pragma := fmt.Sprintf(".timeout 20000\npragma mmap_size=%d;\npragma journal_mode=%s;\n", mmap, mode)
				command(t, fmt.Sprintf("pragma journal_mode=%s; create table t(w, n);", mode), "sqlite3", "-bail", db)
				const writers, rows = 3, 50
				var wg sync.WaitGroup
				for w := range writers {
					wg.Go(func() {
						in := pragma
						for n := range rows {
							in += fmt.Sprintf("insert into t values(%d, %d); select count(*) from t where w=%d;\n", w, n, w)
						}
						if out, err := try(in, "sqlite3", "-bail", db); err != nil {
							t.Errorf("writer %d: %v\n%s", w, err, out)
						}
					})
				}
				wg.Wait()
				got := command(t, pragma+"select count(*) from t; pragma integrity_check;", "sqlite3", db)
				want := fmt.Sprintf("%d\n%s\n%d\nok", mmap, mode, writers*rows)
				if got != want {
					t.Errorf("got %q, want %q", got, want)
				}
			})
		}
	}
}
