package main

import (
	"bytes"
	"strings"
	"testing"
)

func TestSummary(t *testing.T) {
	const pass = `{"Action":"run","Package":"p","Test":"TestA"}
{"Action":"output","Package":"p","Test":"TestA","Output":"=== RUN TestA\n"}
{"Action":"pass","Package":"p","Test":"TestA","Elapsed":0.1}
{"Action":"pass","Package":"p","Elapsed":0.2}
`
	tests := []struct {
		name, events string
		ok           bool
		last         string // the last line
		holds        string // somewhere in the output
	}{
		{"all pass", pass, true, "1 passed, 0 failed, 0 skipped", "ok   p"},
		{"no test ran", `{"Action":"pass","Package":"p"}`, false, "0 passed, 0 failed, 0 skipped", ""},
		{"a package without tests is no skip", pass + `{"Action":"skip","Package":"q"}`, true, "1 passed, 0 failed, 0 skipped", ""},
		{"a skipped test", pass + `{"Action":"output","Package":"p","Test":"TestB","Output":"needs luck\n"}
{"Action":"skip","Package":"p","Test":"TestB"}`, false, "1 passed, 0 failed, 1 skipped", "needs luck"},
		{"a skipped subtest", pass + `{"Action":"skip","Package":"p","Test":"TestB/sub"}`, false,
			"1 passed, 0 failed, 1 skipped", "skipped: p TestB/sub"},
		{"a failed test", `{"Action":"output","Package":"p","Test":"TestB","Output":"got 1\n"}
{"Action":"fail","Package":"p","Test":"TestB"}
{"Action":"fail","Package":"p"}`, false, "0 passed, 1 failed, 0 skipped", "got 1"},
		{"a package that does not build", `{"Action":"build-output","ImportPath":"p","Output":"syntax error\n"}
{"Action":"build-fail","ImportPath":"p"}
{"Action":"fail","Package":"p"}`, false, "0 passed, 1 failed, 0 skipped", "syntax error"},
		{"a test that killed its process", `{"Action":"output","Package":"p","Test":"TestB","Output":"panic: x\n"}
{"Action":"fail","Package":"p"}`, false, "0 passed, 1 failed, 0 skipped", "panic: x"},
		{"a line that is no event", pass + "go: warning\n", true, "1 passed, 0 failed, 0 skipped", "go: warning"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var out bytes.Buffer
			sum := newSummary(&out)
			if err := sum.read(strings.NewReader(tt.events)); err != nil {
				t.Fatal(err)
			}
			ok := sum.close()
			lines := strings.Split(strings.TrimSpace(out.String()), "\n")
			if last := lines[len(lines)-1]; ok != tt.ok || last != tt.last {
				t.Errorf("got %v, %q; want %v, %q", ok, last, tt.ok, tt.last)
			}
			if !strings.Contains(out.String(), tt.holds) {
				t.Errorf("output lacks %q:\n%s", tt.holds, &out)
			}
		})
	}
}
