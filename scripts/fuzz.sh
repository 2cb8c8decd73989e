#!/usr/bin/env bash
# Runs every fuzz target of the module, each for the given time (default 10s).
set -euo pipefail
cd "$(dirname "$0")/.."

time=${1:-10s}
n=0
while read -r folder package; do
	for target in $(cat "$folder"/*_test.go 2>/dev/null | sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\)(.*/\1/p'); do
		echo "== $package $target"
		go test -run '^$' -fuzz "^$target\$" -fuzztime "$time" "$package" </dev/null
		n=$((n + 1))
	done
done < <(go list -f '{{.Dir}} {{.ImportPath}}' ./...)
echo "fuzz: $n targets, $time each"
[ "$n" -gt 0 ]
