#!/usr/bin/env bash
# Builds every platform, in full and with tag nohub, into dist/ and prints the
# sizes. Fails when an armv6 binary is over its limit.
set -euo pipefail
cd "$(dirname "$0")/.."

limit_nohub=11000000 # a Pi Zero's card and memory; what a node needs
limit_full=16000000
version=${VERSION:-$(git describe --tags --always --dirty 2>/dev/null || echo unknown)}
commit=${COMMIT:-$(git rev-parse HEAD 2>/dev/null || echo unknown)}

mkdir -p dist
status=0
printf '%-8s %14s %14s\n' platform full nohub
for platform in armv6 armv7 arm64 amd64; do
	case $platform in
	armv*) arch=arm arm=${platform#armv} ;;
	*) arch=$platform arm= ;;
	esac
	sizes=()
	for tag in '' nohub; do
		out=dist/litefs-agent-$platform${tag:+-$tag}
		CGO_ENABLED=0 GOOS=linux GOARCH=$arch GOARM=$arm go build -trimpath -tags "$tag" \
			-ldflags "-s -w -X main.version=$version -X main.commit=$commit" -o "$out" .
		sizes+=("$(stat -c %s "$out")")
	done
	printf '%-8s %14d %14d\n' "$platform" "${sizes[@]}"
	if [ "$platform" = armv6 ]; then
		if [ "${sizes[0]}" -gt "$limit_full" ]; then
			echo "cross-build: armv6 in full is over $limit_full bytes" >&2
			status=1
		fi
		if [ "${sizes[1]}" -gt "$limit_nohub" ]; then
			echo "cross-build: armv6 with tag nohub is over $limit_nohub bytes" >&2
			status=1
		fi
	fi
done
exit $status
