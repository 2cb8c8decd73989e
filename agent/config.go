package agent

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/BurntSushi/toml"

	"github.com/litefs-agent/litefs-agent/internal/config"
)

// ConfigFile is the configuration where the command line names none.
const ConfigFile = "/etc/litefs-agent/config.toml"

// Config is a node's configuration file. The zero value is of no use: start from
// DefaultConfig.
type Config struct {
	Node      NodeConfig       `toml:"node"`
	Mount     config.Mount     `toml:"mount"`
	Hub       HubConfig        `toml:"hub"`
	Sync      SyncConfig       `toml:"sync"`
	Databases []DatabaseConfig `toml:"database"` // first match wins; without a match: owner "node"
	Proxy     config.Proxy     `toml:"proxy"`
	Status    config.Status    `toml:"status"`
	Log       config.Log       `toml:"log"`
}

// NodeConfig is [node].
type NodeConfig struct {
	ID      string `toml:"id"`      // 1 to 64 of A-Z a-z 0-9 _ -; empty: DefaultID
	Data    string `toml:"data"`    // folder for log, databases, history; absolute
	Restore string `toml:"restore"` // on an empty card: wait (no time-out) | try (60 s) | off
}

// HubConfig is [hub]: the link.
type HubConfig struct {
	URL           config.Strings  `toml:"url"`  // string or list; http(s)://, mqtt(s)://, ws(s)://; empty: stand alone
	CA            string          `toml:"ca"`   // PEM file; empty: the system's
	Cert          string          `toml:"cert"` // with key: mutual TLS
	Key           string          `toml:"key"`
	TokenFile     string          `toml:"token-file"`     // bearer token (HTTP), password (MQTT)
	CommitTimeout config.Duration `toml:"commit-timeout"` // of a commit that waits for the hub
	MQTT          MQTTConfig      `toml:"mqtt"`
}

// MQTTConfig is [hub.mqtt].
type MQTTConfig struct {
	Prefix    string      `toml:"prefix"`     // first levels of all topics
	MaxPacket config.Size `toml:"max-packet"` // of one publish, headers included; 2KiB to 255MiB
}

// SyncConfig is [sync].
type SyncConfig struct {
	Durability  config.Durability `toml:"durability"`   // app: as SQLite asked | commit: every commit | a duration
	Flush       config.Duration   `toml:"flush"`        // what nobody asked to be durable becomes so at the latest after this
	Rate        config.Size       `toml:"rate"`         // bytes a second towards the hub; 0: no limit
	History     config.Duration   `toml:"history"`      // how long single transactions stay on the node once archived
	Budget      config.Size       `toml:"budget"`       // disk for log and history
	Memory      config.Size       `toml:"memory"`       // overlays, journals, WALs, pending records; beyond it they spill
	BacklogStep config.Duration   `toml:"backlog-step"` // distance of the positions that a compacted backlog keeps
}

// DatabaseConfig is [[database]].
type DatabaseConfig struct {
	Name    string `toml:"name"`    // path below the mount; ** crosses /, * does not
	Owner   string `toml:"owner"`   // node | hub
	Promote bool   `toml:"promote"` // hub-owned: ask for the lease at start and keep it
}

// SetDefaults is what a [[database]] has without its keys.
func (d *DatabaseConfig) SetDefaults() { d.Owner = "node" }

// DefaultConfig returns what holds without a file: a node that stands alone.
func DefaultConfig() Config {
	return Config{
		Node:  NodeConfig{Data: "/var/lib/litefs-agent", Restore: "wait"},
		Mount: config.DefaultMount(),
		Hub: HubConfig{
			URL:           config.Strings{},
			CommitTimeout: config.Duration(10 * time.Second),
			MQTT:          MQTTConfig{Prefix: "lfs/1/site", MaxPacket: 96 << 10},
		},
		Sync: SyncConfig{
			Flush:       config.Duration(time.Second),
			History:     config.Duration(24 * time.Hour),
			Budget:      256 << 20,
			Memory:      4 << 20,
			BacklogStep: config.Duration(5 * time.Minute),
		},
		Proxy:  config.DefaultProxy(),
		Status: config.Status{Socket: "/run/litefs-agent/agent.sock"},
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
	cfg.Hub.URL = config.Redact(cfg.Hub.URL)
	return cfg
}

// The limits of values that have one.
const (
	minMaxPacket = 2 << 10
	maxMaxPacket = 255 << 20 // MQTT 3.1.1 ends at 268,435,455 bytes
	minBudget    = 8 << 20
	minMemory    = 1 << 20
)

// Faults returns everything that is wrong with the values.
func (cfg *Config) Faults() []config.Fault {
	var c config.Checker
	if cfg.Node.ID != "" {
		c.ID("node.id", cfg.Node.ID)
	}
	c.Absolute("node.data", cfg.Node.Data)
	c.OneOf("node.restore", cfg.Node.Restore, "wait", "try", "off")
	c.Absolute("mount.dir", cfg.Mount.Dir)
	cfg.Mount.Check(&c, cfg.Node.Data)
	cfg.Hub.check(&c)
	cfg.Sync.check(&c)
	for i, database := range cfg.Databases {
		database.check(&c, fmt.Sprintf("database[%d]", i+1))
	}
	cfg.Proxy.Check(&c)
	cfg.Status.Check(&c)
	cfg.Log.Check(&c)
	return c.List
}

func (h *HubConfig) check(c *config.Checker) {
	for i, rawURL := range h.URL {
		key := "hub.url"
		if len(h.URL) > 1 {
			key = fmt.Sprintf("hub.url[%d]", i+1)
		}
		u := c.URL(key, rawURL, "http", "https", "mqtt", "mqtts", "ws", "wss")
		if u != nil && u.Scheme == "http" && h.TokenFile != "" && !config.Loopback(u.Hostname()) {
			c.Fault(key, "%q: the token of hub.token-file would travel for everybody to read: use https://", u.Redacted())
		}
	}
	c.Pair("hub.cert", h.Cert, "hub.key", h.Key)
	c.Positive("hub.commit-timeout", h.CommitTimeout)
	c.MQTTPrefix("hub.mqtt.prefix", h.MQTT.Prefix)
	c.AtLeast("hub.mqtt.max-packet", h.MQTT.MaxPacket, minMaxPacket)
	if h.MQTT.MaxPacket > maxMaxPacket {
		c.Fault("hub.mqtt.max-packet", "%s: must be at most %s", h.MQTT.MaxPacket, config.Size(maxMaxPacket))
	}
}

func (s *SyncConfig) check(c *config.Checker) {
	c.Positive("sync.flush", s.Flush)
	c.Positive("sync.backlog-step", s.BacklogStep)
	c.AtLeast("sync.budget", s.Budget, minBudget)
	c.AtLeast("sync.memory", s.Memory, minMemory)
}

func (d *DatabaseConfig) check(c *config.Checker, key string) {
	c.DatabasePattern(key+".name", d.Name)
	if d.Name == "nodes" || strings.HasPrefix(d.Name, "nodes/") {
		c.Fault(key+".name", "%q: names below nodes/ are reserved for the hub's view of its nodes", d.Name)
	}
	c.OneOf(key+".owner", d.Owner, "node", "hub")
	if d.Promote && d.Owner == "node" {
		c.Fault(key+".promote", "only a database with owner = \"hub\" can be promoted: a node's own is always its")
	}
}
