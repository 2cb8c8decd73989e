package config

import (
	"os"
	"strings"
	"testing"
)

func TestSet(t *testing.T) {
	url := Setting{"hub", "url", "https://h:1"}
	tests := []struct{ name, text, want string }{
		{"empty", "", "[hub]\nurl = \"https://h:1\"\n"},
		{"no such table", "[node] # n\nid = \"a\"", "[node] # n\nid = \"a\"\n\n[hub]\nurl = \"https://h:1\"\n"},
		{"table without the key", "[hub] # h\nca = \"x\"\n", "[hub] # h\nurl = \"https://h:1\"\nca = \"x\"\n"},
		{"table at the end", "[hub]", "[hub]\nurl = \"https://h:1\"\n"},
		{"in place", "[hub]\n  url   = \"old\"   # why\nca = \"x\"\n", "[hub]\n  url   = \"https://h:1\"   # why\nca = \"x\"\n"},
		{"a list", "[hub]\nurl = [\n \"a\", # one\n \"b\",\n] # two\n", "[hub]\nurl = \"https://h:1\" # two\n"},
		{"literal", "[hub]\nurl = 'o # l = d'# c\n", "[hub]\nurl = \"https://h:1\"# c\n"},
		{"dotted", "hub.url = \"old\"\n", "hub.url = \"https://h:1\"\n"},
		{"quoted key", "[\"hub\"]\n\"url\" = \"\"\n", "[\"hub\"]\n\"url\" = \"https://h:1\"\n"},
		{"below its comment", "[hub]\n#ca = 1\n#url   = \"\"   # the url\n#cert = 2\n", "[hub]\n#ca = 1\n#url   = \"\"   # the url\nurl = \"https://h:1\"\n#cert = 2\n"},
		{"comment of another table", "[hub]\n[x]\n#url = 1\n", "[hub]\nurl = \"https://h:1\"\n[x]\n#url = 1\n"},
		{"the same key elsewhere", "[x]\nurl = \"1\"\n[hub]\n", "[x]\nurl = \"1\"\n[hub]\nurl = \"https://h:1\"\n"},
		{"CRLF", "[hub]\r\nurl = \"1\"\r\nca = \"2\"\r\n", "[hub]\r\nurl = \"https://h:1\"\r\nca = \"2\"\r\n"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Set(tt.text, url)
			if err != nil || got != tt.want {
				t.Fatalf("got %q, %v\nwant %q", got, err, tt.want)
			}
			if again, err := Set(got, url); err != nil || again != got {
				t.Errorf("again: got %q, %v, want no change", again, err)
			}
		})
	}
	for _, text := range []string{"hub = {url = \"old\"}\n", "hub = { }\n"} {
		if got, err := Set(text, url); err == nil {
			t.Errorf("%q: got %q, want an error", text, got)
		}
	}
	for _, value := range []string{"a\nb", "${HOME}"} {
		if got, err := Set("", Setting{"a", "b", value}); err == nil {
			t.Errorf("value %q: got %q, want an error", value, got)
		}
	}
}

// In the shipped example every setting lands below its comment, and nothing else
// changes.
func TestSetInExample(t *testing.T) {
	text, err := os.ReadFile("../../packaging/config.toml")
	if err != nil {
		t.Fatal(err)
	}
	got, err := Set(string(text), Setting{"node", "id", "pi-1"}, Setting{"hub", "url", "https://h:1"}, Setting{"hub", "token-file", "/t"})
	if err != nil {
		t.Fatal(err)
	}
	var rest []string
	for line := range strings.Lines(got) {
		switch line {
		case "id = \"pi-1\"\n", "url = \"https://h:1\"\n", "token-file = \"/t\"\n":
		default:
			rest = append(rest, line)
		}
	}
	if strings.Join(rest, "") != string(text) || len(rest)+3 != strings.Count(got, "\n") {
		t.Errorf("got\n%s", got)
	}
	if i := strings.Index(got, "\nid = \"pi-1\"\n"); !strings.Contains(got[:i], "#id ") || strings.Contains(got[:i], "#data") {
		t.Errorf("the id is not below its comment:\n%s", got)
	}
}
