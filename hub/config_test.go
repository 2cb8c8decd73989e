package hub_test

import (
	"errors"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/litefs-agent/litefs-agent/hub"
	"github.com/litefs-agent/litefs-agent/internal/config"
)

func noEnv(string) (string, bool) { return "", false }

func asItIs(text string) string { return text }

func parseFile(t *testing.T, file string, edit func(string) string) hub.Config {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := hub.ParseConfig(file, edit(string(text)), noEnv)
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

// The values that the contract shows are the defaults, with the exceptions that
// it states.
func TestDefaultsAreTheContract(t *testing.T) {
	cfg := parseFile(t, "testdata/contract.toml", asItIs)
	want := hub.GrantConfig{Node: "pi-*", Database: "config/**", Rights: []string{"read", "borrow", "promote"}}
	if len(cfg.Grants) != 1 || !reflect.DeepEqual(cfg.Grants[0], want) {
		t.Errorf("grant: got %+v, want %+v", cfg.Grants, want)
	}
	cfg.Grants = nil
	if want := hub.DefaultConfig(); !reflect.DeepEqual(cfg, want) {
		t.Errorf("got  %+v\nwant %+v", cfg, want)
	}
}

// commented is a line of the example that shows a key.
var commented = regexp.MustCompile(`(?m)^#([a-z[])`)

func TestExampleParses(t *testing.T) {
	for _, edit := range []func(string) string{
		asItIs,
		func(s string) string { return commented.ReplaceAllString(s, "$1") },
	} {
		cfg := parseFile(t, "../packaging/hub.toml", edit)
		cfg.Grants = nil
		if want := hub.DefaultConfig(); !reflect.DeepEqual(cfg, want) {
			t.Errorf("got  %+v\nwant %+v", cfg, want)
		}
	}
}

func TestConfigFaults(t *testing.T) {
	tests := []struct {
		name, text string
		want       []string // one for each fault, in the order of the file
	}{
		{"open to the world without TLS", "[http]\nlisten = \":20202\"", []string{"f:2: http.listen: :20202: anything but loopback needs TLS"}},
		{"open to the world without authentication", "[http]\nlisten = \"0.0.0.0:1\"\ncert = \"c\"\nkey = \"k\"\n[auth]\ntokens = \"\"",
			[]string{"f:2: http.listen: 0.0.0.0:1: anything but loopback needs authentication"}},
		{"a name may be any address", "[http]\nlisten = \"hub.example:1\"", []string{"needs TLS"}},
		{"TLS and tokens", "[http]\nlisten = \":1\"\ncert = \"c\"\nkey = \"k\"", nil},
		{"IPv6 loopback", "[http]\nlisten = \"[::1]:1\"", nil},
		{"nowhere to connect", "[http]\nlisten = \"\"", []string{"f:2: http.listen: no node can reach"}},
		{"MQTT alone", "[http]\nlisten = \"\"\n[mqtt]\nbroker = \"mqtts://b:8883\"", nil},
		{"two brokers", "[mqtt]\nbroker = \"mqtts://b:8883\"\nlisten = \":1883\"", []string{"f:3: mqtt.listen: either"}},
		{"levels and keep", "[history]\nlevels = [\"5m\", \"5m\", \"x\"]\nkeep = [\"1h\"]", []string{
			`f:2: history.levels[3]: "x": must be a duration`, "f:2: history.levels[2]: 5m: must be above", "f:3: history.keep: has 1 values for 3"}},
		{"grant", "[[grant]]\nrights = [\"wirte\"]\n[[grant]]\nnode=\"*\"\ndatabase=\"**\"", []string{
			"f:1: grant[1].node: must not", "f:1: grant[1].database: ", `f:2: grant[1].rights[1]: "wirte": must be read`, "f:3: grant[2].rights: must name"}},
		{"archive", "[archive]\nurl = \"file://folder\"", []string{"f:2: archive.url: "}},
		{"a key of the node", "[sync]\nrate = \"0\"", []string{"f:2: sync.rate: unknown key"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := hub.ParseConfig("f", tt.text, noEnv)
			if err == nil && tt.want == nil {
				return
			}
			var faults *config.Faults
			if !errors.As(err, &faults) {
				t.Fatalf("got %v, want faults", err)
			}
			lines := strings.Split(err.Error(), "\n")
			if !slices.EqualFunc(lines, tt.want, strings.Contains) {
				t.Errorf("got\n%v\nwant\n%s", err, strings.Join(tt.want, "\n"))
			}
		})
	}
}

func TestConfigRoundTrip(t *testing.T) {
	cfg := parseFile(t, "testdata/contract.toml", asItIs)
	text, err := cfg.TOML()
	if err != nil {
		t.Fatal(err)
	}
	again, err := hub.ParseConfig("show", string(text), noEnv)
	if err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	if !reflect.DeepEqual(again, cfg) {
		t.Errorf("got  %+v\nwant %+v", again, cfg)
	}
}
