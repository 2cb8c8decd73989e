package config

import "testing"

func TestKeyLines(t *testing.T) {
	const text = `top = 1 # [not.a.table]

[a]
x = [
  "]", # ]
  "y",
]
y = """
[b]
z = 1
"""
'q.r' = 'a # b'
[ c . "d" ]
k = { in = "}", line = 1 }
l.m = "\"["

[[e]]
f = '''x'''
[[e]]
f = 2`
	lines := keyLines(text)
	tests := []struct {
		key  string
		want int
	}{
		{"top", 1}, {"a", 3}, {"a.x", 4}, {"a.x[2]", 4}, {"a.y", 8}, {"a.q.r", 12}, {"c.d", 13}, {"c.d.k", 14},
		{"c.d.k.in", 14}, {"c.d.l.m", 15}, {"e[1]", 17}, {"e[1].f", 18}, {"e[2].f", 20}, {"e[2].missing", 19},
		{"b.z", 0}, {"missing", 0},
	}
	for _, tt := range tests {
		if got := lines.of(tt.key); got != tt.want {
			t.Errorf("%s: got line %d, want %d", tt.key, got, tt.want)
		}
	}
}

// The scanner sees texts only after the TOML parser, but must not fail on any.
func FuzzKeyLines(f *testing.F) {
	for _, seed := range []string{"[a]\nb = 1", "a = \"\\", "[[", "x = '''", "=", "a", "[a", "k = [ {"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) { keyLines(text) })
}
