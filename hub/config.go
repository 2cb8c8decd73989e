package hub

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"path"
	"time"

	"github.com/BurntSushi/toml"

	"github.com/litefs-agent/litefs-agent/internal/config"
)

// ConfigFile is the configuration where the command line names none.
const ConfigFile = "/etc/litefs-agent/hub.toml"

// Config is a hub's configuration file. The zero value is of no use: start from
// DefaultConfig.
type Config struct {
	Hub     HubConfig     `toml:"hub"`
	HTTP    HTTPConfig    `toml:"http"`
	MQTT    MQTTConfig    `toml:"mqtt"`
	Auth    AuthConfig    `toml:"auth"`
	Grants  []GrantConfig `toml:"grant"` // what nodes may do with hub-owned databases and with other nodes' ones
	Lease   LeaseConfig   `toml:"lease"`
	Archive ArchiveConfig `toml:"archive"`
	History HistoryConfig `toml:"history"`
	Mount   config.Mount  `toml:"mount"` // dir may be empty: no mount
	Sync    SyncConfig    `toml:"sync"`
	Proxy   config.Proxy  `toml:"proxy"`
	Status  config.Status `toml:"status"`
	Log     config.Log    `toml:"log"`
}

// HubConfig is [hub].
type HubConfig struct {
	ID         string `toml:"id"`         // 1 to 64 of A-Z a-z 0-9 _ -
	Data       string `toml:"data"`       // folder for log, databases, history; absolute
	Divergence string `toml:"divergence"` // device: a device's line becomes current | hold: until an operator decides
}

// HTTPConfig is [http]: where nodes connect.
type HTTPConfig struct {
	Listen string `toml:"listen"` // anything but loopback needs TLS and authentication; empty: no HTTP
	Cert   string `toml:"cert"`   // with key: TLS
	Key    string `toml:"key"`
	// ClientCA is a PEM file: a node that shows a certificate of it needs no token.
	// Without [auth] tokens every node must show one.
	ClientCA string `toml:"client-ca"`
}

// MQTTConfig is [mqtt].
type MQTTConfig struct {
	Broker       string `toml:"broker"` // URL of a broker that is there, or
	Listen       string `toml:"listen"` // address at which to be one; both empty: no MQTT
	Prefix       string `toml:"prefix"` // first levels of all topics
	CA           string `toml:"ca"`     // PEM file; empty: the system's
	Cert         string `toml:"cert"`   // with key: TLS
	Key          string `toml:"key"`
	User         string `toml:"user"`
	PasswordFile string `toml:"password-file"`
}

// AuthConfig is [auth].
type AuthConfig struct {
	Tokens string `toml:"tokens"` // file of the nodes' tokens; absolute
}

// GrantConfig is [[grant]].
type GrantConfig struct {
	Node     string   `toml:"node"`     // pattern of node ids
	Database string   `toml:"database"` // pattern of names; ** crosses /, * does not
	Rights   []string `toml:"rights"`   // read, borrow, promote
}

// LeaseConfig is [lease].
type LeaseConfig struct {
	Timeout config.Duration `toml:"timeout"` // unheard so long, the holder of a promoted lease loses it to who asks
}

// ArchiveConfig is [archive].
type ArchiveConfig struct {
	URL string `toml:"url"` // file:///folder, s3://bucket/prefix?endpoint=&region=, or empty: none
}

// HistoryConfig is [history].
type HistoryConfig struct {
	Levels    []config.Duration `toml:"levels"`    // distance of the moments that each level keeps; ascending
	Keep      []config.Duration `toml:"keep"`      // for how long, per level
	Snapshot  config.Duration   `toml:"snapshot"`  // distance of snapshots
	Snapshots config.Duration   `toml:"snapshots"` // for how long they are kept
}

// SyncConfig is [sync].
type SyncConfig struct {
	Durability config.Durability `toml:"durability"` // of programs at the hub's mount
	Flush      config.Duration   `toml:"flush"`
	Budget     config.Size       `toml:"budget"` // disk for the log
	Memory     config.Size       `toml:"memory"`
}

// DefaultConfig returns what holds without a file: a hub on loopback without
// mount.
func DefaultConfig() Config {
	const day = 24 * time.Hour
	mount := config.DefaultMount()
	mount.Dir = ""
	return Config{
		Hub:     HubConfig{ID: "hub", Data: "/var/lib/litefs-hub", Divergence: "device"},
		HTTP:    HTTPConfig{Listen: "127.0.0.1:20202"},
		MQTT:    MQTTConfig{Prefix: "lfs/1/site"},
		Auth:    AuthConfig{Tokens: "/etc/litefs-agent/tokens"},
		Lease:   LeaseConfig{Timeout: config.Duration(30 * time.Second)},
		Archive: ArchiveConfig{URL: "file:///var/lib/litefs-hub/archive"},
		History: HistoryConfig{
			Levels:    []config.Duration{config.Duration(30 * time.Second), config.Duration(5 * time.Minute), config.Duration(time.Hour)},
			Keep:      []config.Duration{config.Duration(day), config.Duration(7 * day), config.Duration(30 * day)},
			Snapshot:  config.Duration(day),
			Snapshots: config.Duration(90 * day),
		},
		Mount:  mount,
		Sync:   SyncConfig{Flush: config.Duration(time.Second), Budget: 256 << 20, Memory: 64 << 20},
		Proxy:  config.DefaultProxy(),
		Status: config.Status{Socket: "/run/litefs-hub/hub.sock"},
		Log:    config.DefaultLog(),
	}
}

// format is TOML, for package config.
var format = config.Format{
	Decode: func(text string) (tree map[string]any, line int, err error) {
		_, err = toml.Decode(text, &tree)
		if parse, ok := errors.AsType[toml.ParseError](err); ok {
			return nil, parse.Position.Line, errors.New(parse.Message)
		}
		return tree, 0, err
	},
	Marshal: toml.Marshal,
}

// LoadConfig reads file over the defaults. With "" it reads ConfigFile, and the
// defaults hold where that does not exist. The error of a bad file names all its
// faults: a [*config.Faults]. Loading has no side effects.
func LoadConfig(file string, env config.LookupEnv) (Config, error) {
	cfg := DefaultConfig()
	err := format.ReadFile(file, ConfigFile, env, &cfg)
	return cfg, err
}

// ParseConfig is LoadConfig for a text; file only names it in errors.
func ParseConfig(file, text string, env config.LookupEnv) (Config, error) {
	cfg := DefaultConfig()
	err := format.Parse(file, text, env, &cfg)
	return cfg, err
}

// TOML returns the configuration as a file that ParseConfig reads, passwords in
// URLs left out.
func (cfg Config) TOML() ([]byte, error) { return format.Marshal(cfg.redacted()) }

// Tree returns what TOML writes as generic values, for JSON.
func (cfg Config) Tree() (map[string]any, error) { return format.Tree(cfg.redacted()) }

func (cfg Config) redacted() Config {
	cfg.MQTT.Broker = config.Redact([]string{cfg.MQTT.Broker})[0]
	cfg.Archive.URL = config.Redact([]string{cfg.Archive.URL})[0]
	return cfg
}

// The limits of values that have one.
const (
	minBudget = 8 << 20
	minMemory = 1 << 20
)

// Faults returns everything that is wrong with the values.
func (cfg *Config) Faults() []config.Fault {
	var c config.Checker
	c.ID("hub.id", cfg.Hub.ID)
	c.Absolute("hub.data", cfg.Hub.Data)
	c.OneOf("hub.divergence", cfg.Hub.Divergence, "device", "hold")
	cfg.HTTP.check(&c, cfg.Auth)
	cfg.MQTT.check(&c)
	if cfg.HTTP.Listen == "" && cfg.MQTT.Broker == "" && cfg.MQTT.Listen == "" {
		c.Fault("http.listen", "no node can reach this hub: set http.listen, mqtt.broker or mqtt.listen")
	}
	if cfg.Auth.Tokens != "" {
		c.Absolute("auth.tokens", cfg.Auth.Tokens)
	}
	for i, grant := range cfg.Grants {
		grant.check(&c, fmt.Sprintf("grant[%d]", i+1))
	}
	c.Positive("lease.timeout", cfg.Lease.Timeout)
	cfg.Archive.check(&c)
	cfg.History.check(&c)
	cfg.Mount.Check(&c, cfg.Hub.Data)
	c.Positive("sync.flush", cfg.Sync.Flush)
	c.AtLeast("sync.budget", cfg.Sync.Budget, minBudget)
	c.AtLeast("sync.memory", cfg.Sync.Memory, minMemory)
	cfg.Proxy.Check(&c)
	cfg.Status.Check(&c)
	cfg.Log.Check(&c)
	return c.List
}

func (h *HTTPConfig) check(c *config.Checker, auth AuthConfig) {
	c.Pair("http.cert", h.Cert, "http.key", h.Key)
	if h.ClientCA != "" && h.Cert == "" {
		c.Fault("http.client-ca", "needs http.cert: without TLS no node shows a certificate")
	}
	if h.Listen == "" {
		return
	}
	c.Address("http.listen", h.Listen)
	if loopback(h.Listen) {
		return
	}
	if h.Cert == "" {
		c.Fault("http.listen", "%s: anything but loopback needs TLS: set http.cert and http.key, or listen on 127.0.0.1", h.Listen)
	}
	if auth.Tokens == "" && h.ClientCA == "" {
		c.Fault("http.listen", "%s: anything but loopback needs authentication: set auth.tokens or http.client-ca, or listen on 127.0.0.1", h.Listen)
	}
}

// loopback reports whether nobody but this machine reaches the address. A name
// other than localhost may resolve to anything.
func loopback(address string) bool {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return true // reported already
	}
	return config.Loopback(host)
}

func (m *MQTTConfig) check(c *config.Checker) {
	if m.Broker != "" && m.Listen != "" {
		c.Fault("mqtt.listen", "either use the broker at mqtt.broker or be one: leave one of the two empty")
	}
	if m.Broker != "" {
		c.URL("mqtt.broker", m.Broker, "mqtt", "mqtts", "ws", "wss")
	}
	if m.Listen != "" {
		c.Address("mqtt.listen", m.Listen)
	}
	c.MQTTPrefix("mqtt.prefix", m.Prefix)
	c.Pair("mqtt.cert", m.Cert, "mqtt.key", m.Key)
	if m.PasswordFile != "" && m.User == "" {
		c.Fault("mqtt.user", "must be set, since mqtt.password-file is")
	}
}

func (g *GrantConfig) check(c *config.Checker, key string) {
	c.NotEmpty(key+".node", g.Node)
	c.DatabasePattern(key+".database", g.Database)
	if len(g.Rights) == 0 {
		c.Fault(key+".rights", "must name at least one of read, borrow, promote")
	}
	for i, right := range g.Rights {
		c.OneOf(fmt.Sprintf("%s.rights[%d]", key, i+1), right, "read", "borrow", "promote")
	}
}

func (a *ArchiveConfig) check(c *config.Checker) {
	if a.URL == "" {
		return
	}
	u, err := url.Parse(a.URL)
	switch {
	case err == nil && u.Scheme == "file" && u.Host == "" && path.IsAbs(u.Path):
	case err == nil && u.Scheme == "s3" && u.Host != "":
	default:
		c.Fault("archive.url", "%q: must be file:///folder or s3://bucket/prefix", config.Redact([]string{a.URL})[0])
	}
}

func (h *HistoryConfig) check(c *config.Checker) {
	if len(h.Keep) != len(h.Levels) {
		c.Fault("history.keep", "has %d values for %d levels: name one for each of history.levels", len(h.Keep), len(h.Levels))
	}
	if len(h.Levels) > 9 { // a level is one digit in names
		c.Fault("history.levels", "has %d values: must be at most 9", len(h.Levels))
	}
	for i, level := range h.Levels {
		key := fmt.Sprintf("history.levels[%d]", i+1)
		c.Positive(key, level)
		if i > 0 && level <= h.Levels[i-1] {
			c.Fault(key, "%s: must be above the level before it, %s", level, h.Levels[i-1])
		}
	}
	for i, keep := range h.Keep {
		c.Positive(fmt.Sprintf("history.keep[%d]", i+1), keep)
	}
	c.Positive("history.snapshot", h.Snapshot)
	c.Positive("history.snapshots", h.Snapshots)
}
