package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"

	"github.com/litefs-agent/litefs-agent/internal/config"
	"github.com/litefs-agent/litefs-agent/transport"
)

// A Join enrols a node at a hub: it asks the hub whom the token names, and writes
// that into the configuration.
type Join struct {
	File       string // configuration; "": ConfigFile
	URL, Token string
	CA         string // file to trust; "": as configured
	Force      bool   // replace another hub's url
	Env        config.LookupEnv
	// Identify asks the hub at url. Main provides it, as Options.Dial.
	Identify func(ctx context.Context, url string, cfg HubConfig, token string) (*transport.Identity, error)
}

// Joined is what a Join has found and done.
type Joined struct {
	Site, Hub, Node string
	File, TokenFile string
	Changed         bool // else everything was written already
}

// Run enrols. Before the hub has answered it changes nothing; running it again is
// harmless.
func (j Join) Run(ctx context.Context) (*Joined, error) {
	if err := CheckToken(j.Token); err != nil {
		return nil, fmt.Errorf("TOKEN: %w", err)
	}
	file, old, err := j.read()
	if err != nil {
		return nil, err
	}
	cfg, err := ParseConfig(file, old, j.Env)
	if err != nil {
		return nil, err
	}
	text, want, err := j.link(file, old, cfg)
	if err != nil {
		return nil, err
	}
	// What is asked is what will be in force.
	id, err := j.Identify(ctx, j.URL, want.Hub, j.Token)
	if err != nil {
		return nil, err
	}
	if id.Node == "" {
		return nil, errors.New("this hub asks for no token: set [hub] url alone")
	}
	if err := checkData(cfg, id); err != nil {
		return nil, err
	}
	if cfg.Node.ID == "" {
		want.Node.ID = id.Node
		if text, err = config.Set(text, config.Setting{Table: "node", Key: "id", Value: id.Node}); err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
	}
	if got, err := ParseConfig(file, text, j.Env); err != nil {
		return nil, err
	} else if !reflect.DeepEqual(got, want) {
		return nil, fmt.Errorf("%s: cannot be changed without changing more than the link: set url, token-file and id by hand", file)
	}
	done := &Joined{Site: id.Site.String(), Hub: id.Hub, Node: id.Node, File: file, TokenFile: want.Hub.TokenFile}
	return done, j.write(done, old, text, cfg.Node.Data)
}

// read returns the configuration's file, behind links, and its text, "" where
// there is none yet.
func (j Join) read() (file, text string, err error) {
	if file = j.File; file == "" {
		file = ConfigFile
	}
	if file, err = filepath.Abs(file); err != nil {
		return "", "", err
	}
	if real, err := filepath.EvalSymlinks(file); err == nil {
		file = real
	}
	b, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", "", fmt.Errorf("configuration: %w", err)
	}
	return file, string(b), nil
}

// link sets url, token-file and ca.
func (j Join) link(file, text string, cfg Config) (string, Config, error) {
	var list []config.Setting
	set := func(key, value string) { list = append(list, config.Setting{Table: "hub", Key: key, Value: value}) }
	same := func(url string) bool { return strings.TrimSuffix(url, "/") == strings.TrimSuffix(j.URL, "/") }
	switch {
	case slices.ContainsFunc(cfg.Hub.URL, same):
	case len(cfg.Hub.URL) > 0 && !j.Force:
		return "", cfg, fmt.Errorf("%s: this node ships to %s: --force makes it ship to %s instead",
			file, strings.Join(config.Redact(cfg.Hub.URL), ", "), config.Redact([]string{j.URL})[0])
	default:
		set("url", j.URL)
		cfg.Hub.URL = config.Strings{j.URL}
	}
	if cfg.Hub.TokenFile == "" {
		cfg.Hub.TokenFile = filepath.Join(filepath.Dir(file), "token")
		set("token-file", cfg.Hub.TokenFile)
	}
	if j.CA != "" {
		ca, err := filepath.Abs(j.CA)
		if err != nil {
			return "", cfg, err
		}
		if ca != cfg.Hub.CA {
			cfg.Hub.CA = ca
			set("ca", ca)
		}
	}
	text, err := config.Set(text, list...)
	if err == nil {
		_, err = ParseConfig(file, text, j.Env) // names what is wrong with the URL before the token leaves
	} else {
		err = fmt.Errorf("%s: %w", file, err)
	}
	return text, cfg, err
}

// checkData compares what the hub says with configuration and data folder.
func checkData(cfg Config, id *transport.Identity) error {
	if cfg.Node.ID != "" && cfg.Node.ID != id.Node {
		return fmt.Errorf("the token is of node %q, the configuration has [node] id = %q: make one for it with 'litefs-agent hub token add %s'",
			id.Node, cfg.Node.ID, cfg.Node.ID)
	}
	kept, err := os.ReadFile(filepath.Join(cfg.Node.Data, "id"))
	if name := strings.TrimSpace(string(kept)); err == nil && name != id.Node {
		return fmt.Errorf("the token is of node %q, the data folder %s of node %q: make a token for that with 'litefs-agent hub token add %s', or start with an empty data folder",
			id.Node, cfg.Node.Data, name, name)
	} else if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("data folder: %w", err)
	}
	var link linkState
	text, err := os.ReadFile(filepath.Join(cfg.Node.Data, linkFile))
	if err == nil {
		err = json.Unmarshal(text, &link)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("data folder: %w", err)
	}
	if link.Site != "" && link.Site != id.Site.String() {
		return fmt.Errorf("the hub is of site %s, this node belongs to site %s: start the hub with --site %s if it has lost its data, or the node with an empty data folder",
			id.Site, link.Site, link.Site)
	}
	return nil
}

// write brings token and configuration to the disk, where they differ.
func (j Join) write(done *Joined, old, text, data string) error {
	if now, err := ReadToken(done.TokenFile); err != nil || now != j.Token {
		owner := done.TokenFile
		if _, err := os.Stat(owner); err != nil {
			owner = data // its owner is who runs the node
		}
		if err := os.MkdirAll(filepath.Dir(done.TokenFile), 0o755); err != nil {
			return fmt.Errorf("token file: %w", err)
		}
		if err := config.ReplaceFile(done.TokenFile, []byte(j.Token+"\n"), 0o600, owner); err != nil {
			return fmt.Errorf("token file: %w", err)
		}
		done.Changed = true
	}
	if text == old {
		return nil
	}
	mode := os.FileMode(0o644)
	if info, err := os.Stat(done.File); err == nil {
		mode = info.Mode().Perm()
	}
	if err := config.ReplaceFile(done.File, []byte(text), mode, done.File); err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	done.Changed = true
	return nil
}
