package main

import (
	"errors"
	"fmt"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/litefs-agent/litefs-agent/agent"
	"github.com/litefs-agent/litefs-agent/internal/config"
)

// loadedConfig is a configuration in force.
type loadedConfig interface {
	TOML() ([]byte, error)
	Tree() (map[string]any, error)
}

// A configKind is a node's or a hub's configuration.
type configKind struct {
	name string
	file string // where the command line names none
	load func(file string, env config.LookupEnv) (loadedConfig, error)
}

func nodeConfigKind() *configKind {
	return &configKind{
		name: "node", file: agent.ConfigFile,
		load: func(file string, env config.LookupEnv) (loadedConfig, error) { return agent.LoadConfig(file, env) },
	}
}

func newConfig(a *app) *cobra.Command {
	var file string
	var asHub bool
	check := &cobra.Command{
		Use:   "check",
		Short: "validate a configuration and print all its faults",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			kind, name, _, err := loadConfig(a, file, asHub)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(a.stdout, "%s: good, a %s's\n", name, kind.name)
			return err
		},
	}
	show := a.jsonFlag(&cobra.Command{
		Use:   "show",
		Short: "print the configuration in force, defaults included",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			_, _, cfg, err := loadConfig(a, file, asHub)
			if err != nil {
				return err
			}
			if a.json {
				tree, err := cfg.Tree()
				if err != nil {
					return err
				}
				return printJSON(a.stdout, tree)
			}
			text, err := cfg.TOML()
			if err != nil {
				return err
			}
			_, err = a.stdout.Write(text)
			return err
		},
	})
	cmd := group("config", "look at the configuration", check, show)
	cmd.PersistentFlags().StringVar(&file, "config", "", "configuration `FILE` (default: the node's, else the hub's)")
	cmd.PersistentFlags().BoolVar(&asHub, "hub", false, "it is a hub's (default: what its keys say)")
	return cmd
}

// loadConfig loads file, "" for a default one, and returns also what it is and
// its name. Without asHub the kind is that which finds no fault, or fewer.
func loadConfig(a *app, file string, asHub bool) (*configKind, string, loadedConfig, error) {
	node, hub := nodeConfigKind(), hubConfigKind()
	if asHub && hub == nil {
		return nil, "", nil, errors.New("this build has no hub")
	}
	var kinds []*configKind // in the order of preference
	switch {
	case asHub:
		kinds = []*configKind{hub}
	case hub == nil:
		kinds = []*configKind{node}
	case file == "" && !exists(node.file) && exists(hub.file):
		kinds = []*configKind{hub}
	case file == "":
		kinds = []*configKind{node}
	case filepath.Base(file) == filepath.Base(hub.file):
		kinds = []*configKind{hub, node}
	default:
		kinds = []*configKind{node, hub}
	}
	var best *configKind
	var bestErr error
	for _, kind := range kinds {
		cfg, err := kind.load(file, a.env)
		if err == nil {
			name := file
			if name == "" {
				name = kind.file
			}
			if !exists(name) {
				name = "defaults (no " + name + ")"
			}
			return kind, name, cfg, nil
		}
		if best == nil || faultN(err) < faultN(bestErr) {
			best, bestErr = kind, err
		}
	}
	return best, file, nil, bestErr
}

// faultN is the number of faults that err reports.
func faultN(err error) int {
	if faults, ok := errors.AsType[*config.Faults](err); ok {
		return len(faults.List)
	}
	return 1
}
