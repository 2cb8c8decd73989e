# 'make demo' and 'make test' do all the set-up themselves: they need git, make,
# curl and the Go release that go.mod names, on Debian 12 or Raspberry Pi OS.

SHELL       := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS   += --no-print-directory
.DEFAULT_GOAL := build

GO      ?= go
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
COMMIT  ?= $(shell git rev-parse HEAD 2>/dev/null || echo unknown)
LDFLAGS := -s -w -X main.version=$(VERSION) -X main.commit=$(COMMIT)
FUZZTIME  ?= 10s
BENCHTIME ?= 1s
PREFIX    ?= /usr/local

ROUNDS     ?= 5
BENCHWORK  ?= $(CURDIR)/.build/bench/work
BENCHFLAGS ?=
BENCHCOMMAND = $(strip ROUNDS=$(ROUNDS) $(foreach v,QUICK SLOW BIG LONG BENCHFLAGS,$(if $($v),$v="$($v)")) make bench)
AS_ROOT     = $(if $(filter-out 0,$(shell id -u)),sudo)

export CGO_ENABLED := 0
export VERSION COMMIT

.PHONY: help build install demo fresh test test-f2fs soak sabotage race test-arm check fmt vet lint imports cross bench bench-go sqlite-tests fuzz man setup clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: ## bin/litefs-agent for this machine
	$(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/litefs-agent .

install: build man ## the program, its man pages and completions, below PREFIX (/usr/local)
	install -D -m 0755 bin/litefs-agent $(DESTDIR)$(PREFIX)/bin/litefs-agent
	install -d $(DESTDIR)$(PREFIX)/share/man/man1
	install -m 0644 dist/man/*.1 $(DESTDIR)$(PREFIX)/share/man/man1/
	install -d $(DESTDIR)$(PREFIX)/share/bash-completion/completions
	bin/litefs-agent completion bash > $(DESTDIR)$(PREFIX)/share/bash-completion/completions/litefs-agent

setup: ## install the Debian packages that tests and demo need, where they are missing
	@scripts/setup.sh

demo: setup build ## a hub and a node on loopback in a temporary folder, shown at work
	bin/litefs-agent demo

fresh: ## make demo in a fresh Debian 12 tree that has only git, make, curl and Go
	scripts/fresh.sh make demo

test: build ## every test; fails on a skipped one too
	@scripts/setup.sh test
	$(GO) run ./internal/tools/citest ./...

# The random tests at length. Each part by itself: make soak SOAK=power.
SOAK        ?= store log sparse hub kill power errors
SOAK_STORE  ?= 100000
SOAK_LOG    ?= 60000
SOAK_SPARSE ?= 20000
SOAK_HUB    ?= 300
SOAK_KILL   ?= 12
SOAK_POWER  ?= 60
SOAK_ERRORS ?= 20
GOTEST_SOAK  = $(GO) test -count=1 -timeout 2h -v

soak: build $(addprefix soak-,$(SOAK)) ## the random tests at length, about an hour (SOAK="store log sparse hub kill power errors")
	@echo "soak: $(SOAK) passed"

.PHONY: soak-store soak-log soak-sparse soak-hub soak-kill soak-power soak-errors

soak-store: # points at which the engine on a simulated disk is cut
	$(GOTEST_SOAK) -run '^TestCrashSoak$$' ./store -store.points $(SOAK_STORE)

soak-log: # seeds of the log's crash test
	$(GOTEST_SOAK) -run '^TestCrash$$' ./internal/commitlog -crash.n $(SOAK_LOG)

soak-sparse: # stories of the spilled memory
	$(GOTEST_SOAK) -run '^TestModel$$' ./internal/sparse -sparse.n $(SOAK_SPARSE)

soak-hub: # rounds of a link that fails in every way
	$(GOTEST_SOAK) -run '^TestShipThroughFaults$$' ./hub -hub.rounds $(SOAK_HUB) -hub.seed $$(date +%s)

soak-kill: # times the kill -9 of programs (25 rounds a mode) and agent (12), and random SQL
	@scripts/setup.sh test
	$(GOTEST_SOAK) -run '^(TestKill.*|TestStopUnderLoad|TestRandomSQL)$$' ./e2e -soak $(SOAK_KILL)

soak-power: # times two power cuts with durability app and commit, two on each file system
	@scripts/setup.sh test
	$(GOTEST_SOAK) -run '^(TestPowerLoss|TestFileSystems)$$' ./e2e -soak $(SOAK_POWER)

soak-errors: # times each way in which a disk fails
	@scripts/setup.sh test
	$(GOTEST_SOAK) -run '^TestDiskErrors$$' ./e2e -soak $(SOAK_ERRORS)

# Each durability rule of the engine is switched off in turn, and one test must
# notice. First: nothing of that is in the product.
sabotage: ## switch off each durability rule in turn, and show the test that notices; fails where none does
	@mkdir -p .build/sabotage
	$(GO) build -o .build/sabotage/agent .
	@if $(GO) tool nm .build/sabotage/agent | grep -i sabotage; then echo "sabotage is in the product"; exit 1; fi
	$(GO) build -tags sabotage -o .build/sabotage/agent-sabotage .
	@$(GO) tool nm .build/sabotage/agent-sabotage | grep -q internal/sabotage || { echo "the check for sabotage in the product cannot fail"; exit 1; }
	$(GO) run ./internal/tools/sabotage -dir .build/sabotage

race: ## every test under the race detector (amd64 and arm64)
	@scripts/setup.sh test race
	CGO_ENABLED=1 $(GO) run ./internal/tools/citest -race ./...

# Root; Debian's packages user-mode-linux and kmod. Not part of make test.
test-f2fs: ## power cuts with the data folder on f2fs, and vfat refused, in a kernel that has both (user-mode-linux)
	@scripts/setup.sh test
	scripts/uml.sh '^(TestFileSystems|TestUnfitFileSystems)$$/^(f2fs|vfat)$$' TestFileSystems/f2fs TestUnfitFileSystems/vfat

# Packages that need no mount run as 32-bit ARM code under emulation.
test-arm: ## the tests of the formats as ARMv6 code, under qemu-user
	@scripts/setup.sh arm
	@pkgs=$$($(GO) list ./ltx/... ./internal/...); \
	host=$$($(GO) env GOOS)-$$($(GO) env GOARCH); \
	GOOS=$${host%-*} GOARCH=$${host#*-} $(GO) build -o .build/citest ./internal/tools/citest; \
	GOARCH=arm GOARM=6 .build/citest -exec qemu-arm $$pkgs

check: fmt vet lint imports cross ## all that needs no test run: format, vet, linter, imports, ARM builds and their sizes

fmt:
	@files=$$(gofmt -l $$(git ls-files -co --exclude-standard '*.go')); \
	if [ -n "$$files" ]; then echo "not formatted, run gofmt -w:"; echo "$$files"; exit 1; fi

vet:
	GOARCH=amd64 $(GO) vet ./...
	GOARCH=arm GOARM=6 $(GO) vet ./...
	GOARCH=arm GOARM=6 $(GO) vet -tags nohub ./...

lint:
	$(GO) tool -modfile=internal/tools/staticcheck/go.mod staticcheck ./...
	$(GO) tool -modfile=internal/tools/staticcheck/go.mod staticcheck -tags nohub .

imports:
	$(GO) test -count=1 -run '^TestImports$$' .

cross: ## dist/: armv6, armv7, arm64, amd64, in full and without the hub; fails above the size limits
	scripts/cross-build.sh

# Root, or with sudo: loop devices, strace, dropped caches. bench/README.md.
bench: ## SQLite on the mount next to plain ext4 (ROUNDS=5 QUICK=1 SLOW=1 BIG=1 LONG=1), as one table
	@scripts/setup.sh bench
	@mkdir -p .build/bench
	@$(GO) build -trimpath -ldflags '$(LDFLAGS)' -o .build/bench/litefs-agent .
	@$(GO) build -trimpath -tags nohub -ldflags '$(LDFLAGS)' -o .build/bench/litefs-agent-nohub .
	@cd bench && CGO_ENABLED=1 $(GO) build -o ../.build/bench/bench .
	@$(AS_ROOT) .build/bench/bench -agent .build/bench/litefs-agent -lean .build/bench/litefs-agent-nohub \
		-work $(BENCHWORK) -results bench/results -command '$(BENCHCOMMAND)' -rounds $(ROUNDS) \
		$(if $(QUICK),-quick) $(if $(SLOW),-slow) $(if $(BIG),-big) $(if $(LONG),-long) $(BENCHFLAGS)

# Root, or with sudo: a mount namespace, an ordinary user. docs/testing.md.
sqlite-tests: ## SQLite's own tests on ext4 and at the mount, compared (ONLY=tcl/wal*,mptest/*/* UPDATE=1); 20 minutes
	@scripts/setup.sh sqlite
	@scripts/sqlite-build.sh .build/sqlite
	@$(GO) build -trimpath -ldflags '$(LDFLAGS)' -o .build/sqlite/litefs-agent .
	@$(GO) build -o .build/sqlite/sqlitetests ./internal/tools/sqlitetests
	@$(AS_ROOT) .build/sqlite/sqlitetests -sqlite .build/sqlite/src -agent .build/sqlite/litefs-agent -work .build/sqlite/work \
		-lists sqlitetests $(if $(ONLY),-only '$(ONLY)') $(if $(UPDATE),-update)

bench-go: setup build ## the Go benchmarks of every package (BENCHTIME=1s)
	$(GO) test -run '^$$' -bench . -benchmem -benchtime $(BENCHTIME) ./...

fuzz: ## every fuzz target for FUZZTIME (10s)
	scripts/fuzz.sh $(FUZZTIME)

man: ## dist/man: the man pages
	$(GO) test -count=1 -run '^TestManPages$$' . -man $(CURDIR)/dist/man

clean: ## remove what the targets made
	rm -rf bin dist .build
