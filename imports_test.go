package main

import (
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/litefs-agent/litefs-agent"

// An importRule says what packages below a path may import of this module.
// Packages outside it and tests are not its business.
type importRule struct {
	path   string   // in the module, "" is main; holds for what is below it too; the longest that fits counts
	may    []string // paths; with "/..." also what is below
	reason string
}

var importRules = []importRule{
	{"", []string{"agent", "hub", "service", "fuse", "proxy", "transport/...", "store", "ltx", "internal/..."},
		"main wires everything together"},
	{"agent", []string{"service", "store", "transport", "ltx", "internal/..."},
		"a node ships what the engine records over any link; main hands it link, mount and proxy"},
	{"hub", []string{"service", "store", "transport", "ltx", "internal/..."},
		"a hub likewise; it knows nodes only by what a link says"},
	{"service", []string{"store", "fuse", "ltx", "internal/..."},
		"what node and hub share: data folder, engine, mount, answers to commands; it knows no link"},
	{"fuse", []string{"store", "ltx", "internal/..."},
		"the mount is a view of the engine: it must work without any hub"},
	{"transport", []string{"ltx", "internal/..."},
		"a link carries records of any engine"},
	{"transport/http", []string{"transport", "ltx", "internal/..."},
		"carries the link and nothing else: what it needs of node or hub is an interface of transport"},
	{"transport/mqtt", []string{"transport", "ltx", "internal/..."},
		"likewise"},
	{"store", []string{"ltx", "internal/..."},
		"the engine is the same on node and hub and knows neither them nor links nor the mount"},
	{"proxy", []string{"ltx", "internal/..."},
		"knows positions through an interface of its own, so that it can be tested without an engine"},
	{"e2e", []string{"internal/..."},
		"tests of the built program"},
	{"ltx", nil,
		"a format that strangers import: it brings nothing of ours"},
	{"internal", []string{"ltx", "internal/..."},
		"serves several packages and so must not know any of them"},
	{"internal/tools", []string{"internal/..."},
		"tools of the build, not of the product"},
}

// onlyImporters says who alone imports a module of others, or an own package.
var onlyImporters = []struct {
	imported string // import path; what is below it too
	by       []string
	reason   string
}{
	{"github.com/hanwen/go-fuse/v2", []string{"fuse"}, "one package speaks to the kernel; the engine is tested without it"},
	{"github.com/eclipse/paho.mqtt.golang", []string{"transport/mqtt"}, "a change of MQTT library touches one package"},
	{"github.com/BurntSushi/toml", []string{"agent", "hub"}, "config.go of each reads the file; everybody else gets values"},
	{"github.com/spf13/cobra/doc", []string{"internal/tools/mandoc"}, "man pages are made by the build: the product does not carry their generator"},
	{"github.com/spf13/cobra", []string{"", "internal/tools/mandoc"}, "below main nobody knows of a command line"},
	{"github.com/spf13/pflag", []string{""}, "likewise"},
	{module + "/internal/tools", []string{}, "the product needs no tool of its build"},
}

// goList returns what 'go list' prints of the module's packages, a line each.
func goList(t *testing.T, args ...string) []string {
	t.Helper()
	out, err := exec.Command("go", append([]string{"list"}, args...)...).Output()
	if err != nil {
		if exit, ok := err.(*exec.ExitError); ok {
			err = &exec.Error{Name: string(exit.Stderr), Err: err}
		}
		t.Fatalf("go list: %v", err)
	}
	return strings.Split(strings.TrimSpace(string(out)), "\n")
}

func below(path, root string) bool {
	return path == root || strings.HasPrefix(path, root+"/")
}

// ours is the path in the module, and whether importPath is of the module.
func ours(importPath string) (string, bool) {
	if importPath == module {
		return "", true
	}
	return strings.CutPrefix(importPath, module+"/")
}

func ruleOf(path string) (importRule, bool) {
	var best importRule
	found := false
	for _, rule := range importRules {
		fits := rule.path == path || rule.path != "" && below(path, rule.path)
		if fits && (!found || len(rule.path) > len(best.path)) {
			best, found = rule, true
		}
	}
	return best, found
}

// allows reports whether packages of r may import path. Those that share a rule
// may import each other.
func (r importRule) allows(path string) bool {
	to, _ := ruleOf(path)
	return to.path == r.path || slices.ContainsFunc(r.may, func(may string) bool {
		root, deep := strings.CutSuffix(may, "/...")
		return path == root || deep && below(path, root)
	})
}

// Imports point one way. Both builds are looked at, for ARM as everywhere.
func TestImports(t *testing.T) {
	for _, tags := range []string{"", "nohub"} {
		for _, line := range goList(t, "-tags", tags, "-f", `{{.ImportPath}}{{range .Imports}} {{.}}{{end}}`, "./...") {
			fields := strings.Fields(line)
			path, ok := ours(fields[0])
			if !ok {
				t.Fatalf("package %s is not of module %s", fields[0], module)
			}
			rule, ok := ruleOf(path)
			if !ok {
				t.Errorf("package %s has no rule: where does it stand?", path)
				continue
			}
			for _, imported := range fields[1:] {
				if to, ok := ours(imported); ok && !rule.allows(to) {
					t.Errorf("%s must not import %s: %s", fields[0], to, rule.reason)
				}
				for _, only := range onlyImporters {
					if below(imported, only.imported) && !slices.Contains(only.by, path) && !below(imported, fields[0]) {
						t.Errorf("%s must not import %s, only %q may: %s", fields[0], imported, only.by, only.reason)
					}
				}
			}
		}
	}
}

// The product holds no tool, and without its hub no hub.
func TestProductDependencies(t *testing.T) {
	for tags, unwanted := range map[string][]string{
		"":      {"github.com/spf13/cobra/doc", "honnef.co/go/tools", "testing", module + "/internal/tools", module + "/internal/testrig"},
		"nohub": {"github.com/spf13/cobra/doc", "honnef.co/go/tools", "testing", module + "/internal/tools", module + "/hub"},
	} {
		for _, dep := range goList(t, "-deps", "-tags", tags, ".") {
			for _, path := range unwanted {
				if below(dep, path) {
					t.Errorf("the product (tags %q) depends on %s", tags, dep)
				}
			}
		}
	}
}
