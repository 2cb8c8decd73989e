package agent_test

import (
	"errors"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/litefs-agent/litefs-agent/agent"
	"github.com/litefs-agent/litefs-agent/internal/config"
)

func noEnv(string) (string, bool) { return "", false }

func asItIs(text string) string { return text }

func parseFile(t *testing.T, file string, edit func(string) string) agent.Config {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := agent.ParseConfig(file, edit(string(text)), noEnv)
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

// The values that the contract shows are the defaults, with the exceptions that
// it states.
func TestDefaultsAreTheContract(t *testing.T) {
	cfg := parseFile(t, "testdata/contract.toml", asItIs)
	if want := (config.Strings{"https://hub.example:20202"}); !slices.Equal(cfg.Hub.URL, want) {
		t.Errorf("hub.url: got %q, want %q", cfg.Hub.URL, want)
	}
	if want := []agent.DatabaseConfig{{Name: "config/**", Owner: "hub"}}; !slices.Equal(cfg.Databases, want) {
		t.Errorf("database: got %+v, want %+v", cfg.Databases, want)
	}
	cfg.Hub.URL = config.Strings{}
	cfg.Proxy.Target, cfg.Proxy.DB = "", ""
	cfg.Databases, cfg.Proxy.Routes = nil, nil
	if want := agent.DefaultConfig(); !reflect.DeepEqual(cfg, want) {
		t.Errorf("got  %+v\nwant %+v", cfg, want)
	}
}

// commented is a line of an example that shows a key.
var commented = regexp.MustCompile(`(?m)^#([a-z[])`)

func TestExampleParses(t *testing.T) {
	cfg := parseFile(t, "../packaging/config.toml", asItIs)
	if want := agent.DefaultConfig(); !reflect.DeepEqual(cfg, want) {
		t.Errorf("as shipped: got  %+v\nwant %+v", cfg, want)
	}
}

func TestExampleParsesWithEveryLineOn(t *testing.T) {
	cfg := parseFile(t, "../packaging/config.toml", func(s string) string {
		return commented.ReplaceAllString(s, "$1")
	})
	cfg.Proxy, cfg.Databases = config.DefaultProxy(), nil
	if want := agent.DefaultConfig(); !reflect.DeepEqual(cfg, want) {
		t.Errorf("got  %+v\nwant %+v", cfg, want)
	}
}

func TestConfigFaults(t *testing.T) {
	const text = `[node]
id = "pi zero"
dta = "/x"

[hub]
url = ["https://hub.example", "ftp://u:secret@hub.example"]
cert = "/c.pem"
commit-timeout = "10"
ca = "${NOT_SET}"

[hub.mqtt]
max-packet = "1KiB"
prefix = """a/
#"""

[sync]
budget = [
  1,
]
rate = -5

[[database]]
name = "a.db"

[[database]]
name = "/abs"
owner = "me"

[[database]]
name = "nodes/x"
promote = true

[proxy]
listen = ":8080"

[mount]
dir = "/var/lib/litefs-agent/mnt"
file-mode = "0999"

[whatever]
x = 1
`
	_, err := agent.ParseConfig("f.toml", text, noEnv)
	var faults *config.Faults
	if !errors.As(err, &faults) {
		t.Fatalf("got %v, want faults", err)
	}
	want := []string{
		`f.toml:2: node.id: "pi zero": must be`,
		`f.toml:3: node.dta: unknown key`,
		`f.toml:6: hub.url[2]: "ftp://u:xxxxx@hub.example": must be a URL`,
		`hub.key: must be set, since hub.cert is`,
		`f.toml:8: hub.commit-timeout: "10": must be a duration`,
		`f.toml:9: hub.ca: ${NOT_SET}: not set`,
		`f.toml:12: hub.mqtt.max-packet: 1KiB: must be at least 2KiB`,
		`f.toml:13: hub.mqtt.prefix: `,
		`f.toml:17: sync.budget: must be a string`,
		`f.toml:20: sync.rate: -5: must be`,
		`f.toml:26: database[2].name: "/abs": must be a path below the mount`,
		`f.toml:27: database[2].owner: "me": must be node, hub`,
		`f.toml:30: database[3].name: "nodes/x": names below nodes/ are reserved`,
		`f.toml:31: database[3].promote: only`,
		`proxy.target: "": must be an address`,
		`proxy.db: "": must be a path`,
		`f.toml:37: mount.dir: /var/lib/litefs-agent/mnt: must be neither inside`,
		`f.toml:38: mount.file-mode: "0999": must be permission bits`,
		`f.toml:40: whatever: unknown key`,
	}
	for _, line := range want {
		if !strings.Contains(err.Error(), line) {
			t.Errorf("lacks %q", line)
		}
	}
	if len(faults.List) != len(want) || t.Failed() {
		t.Errorf("got %d faults, want %d:\n%v", len(faults.List), len(want), err)
	}
}

func TestConfigSyntaxError(t *testing.T) {
	_, err := agent.ParseConfig("f.toml", "[node]\nid = \n", noEnv)
	if err == nil || !strings.HasPrefix(err.Error(), "f.toml:2: ") {
		t.Errorf("got %v, want an error in line 2", err)
	}
}

func TestConfigEnv(t *testing.T) {
	env := func(name string) (string, bool) {
		value, ok := map[string]string{"HUB": "hub.example", "EMPTY": "", "SIZE": "64MiB"}[name]
		return value, ok
	}
	cfg, err := agent.ParseConfig("f", `
[hub]
url = "https://${HUB}:1${EMPTY}"
token-file = "$HOME/{x}"
[sync]
budget = "${SIZE}"
[proxy]
passthrough = ["/${HUB}"]`, env)
	if err != nil {
		t.Fatal(err)
	}
	if got := []string{cfg.Hub.URL[0], cfg.Hub.TokenFile, cfg.Sync.Budget.String(), cfg.Proxy.Passthrough[0]}; !slices.Equal(got,
		[]string{"https://hub.example:1", "$HOME/{x}", "64MiB", "/hub.example"}) {
		t.Errorf("got %q", got)
	}
}

// What 'config show' prints is a configuration that says the same.
func TestConfigRoundTrip(t *testing.T) {
	cfg := parseFile(t, "testdata/contract.toml", asItIs)
	cfg.Sync.Durability = config.Durability{AtLatest: 90}
	text, err := cfg.TOML()
	if err != nil {
		t.Fatal(err)
	}
	again, err := agent.ParseConfig("show", string(text), noEnv)
	if err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	if !reflect.DeepEqual(again, cfg) {
		t.Errorf("got  %+v\nwant %+v", again, cfg)
	}
}

func TestShowHidesPasswords(t *testing.T) {
	cfg := agent.DefaultConfig()
	cfg.Hub.URL = config.Strings{"mqtt://user:secret@broker:1883"}
	text, err := cfg.TOML()
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(text), "secret") || !strings.Contains(string(text), "mqtt://user:xxxxx@broker:1883") {
		t.Errorf("got %s", text)
	}
	if cfg.Hub.URL[0] != "mqtt://user:secret@broker:1883" {
		t.Errorf("the configuration itself became %q", cfg.Hub.URL)
	}
}
