#!/usr/bin/env bash
# Builds SQLite's own test programs, testfixture and mptester, from Debian's source
# package into DIR/src (default .build/sqlite); three minutes on two cores, once.
# Usage: scripts/sqlite-build.sh [DIR]     Packages: scripts/setup.sh sqlite.
# The package lists of source packages are kept apart: /etc/apt stays as it is.
set -euo pipefail
cd "$(dirname "$0")/.."
dir=${1:-.build/sqlite}
mkdir -p "$dir"
harness=$PWD/sqlitetests/harness.tcl
cd "$dir"
if [ -e src/built ]; then
	cp "$harness" src/test/
	exit 0
fi

orig() { find . -maxdepth 1 -name 'sqlite3_*.orig.tar.xz' -print -quit; }
if [ -z "$(orig)" ]; then
	echo "sqlite-build.sh: fetching Debian's source package sqlite3" >&2
	apt=$(mktemp -d)
	trap 'rm -rf "$apt"' EXIT
	chmod 755 "$apt" # apt fetches as a user of its own
	mkdir -p "$apt/parts" "$apt/lists/partial"
	for list in /etc/apt/sources.list /etc/apt/sources.list.d/debian.sources; do
		[ ! -e "$list" ] || sed 's/^Types:.*/Types: deb-src/; s/^deb /deb-src /' "$list" >"$apt/parts/${list##*/}"
	done
	options=(-qq -o Dir::Etc::sourcelist=/dev/null -o "Dir::Etc::sourceparts=$apt/parts"
		-o "Dir::State::lists=$apt/lists" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache=)
	[ "$(id -u)" != 0 ] || options+=(-o APT::Sandbox::User=root) # it cannot write here otherwise
	apt-get "${options[@]}" update >/dev/null
	apt-get "${options[@]}" source --download-only sqlite3 >/dev/null
fi

echo "sqlite-build.sh: building testfixture and mptester of $(orig)" >&2
rm -rf src
mkdir src
tar -C src --strip-components=1 -xf "$(orig)"
cd src
step() { # LOG COMMAND...
	local log=$1
	shift
	"$@" >"$log" 2>&1 || { tail -20 "$log" >&2; echo "sqlite-build.sh: failed: $*" >&2; exit 1; }
}
step configure.log env CFLAGS=-O1 ./configure --enable-all --with-tcl=/usr/lib/tcl8.6
# Upstream compiles the syncs out of testfixture. Here they are what is tested.
sed -i 's/ -DSQLITE_NO_SYNC=1//' Makefile
step make.log make -j"$(nproc)" testfixture mptester
# What the mount needs: see harness.tcl. config01 wants MEMORY and OFF for two of
# its five tasks, and the other three would wait for them for ever.
sed -i 's/^sqlite3_test_control_pending_byte 0x0010000$/source $testdir\/harness.tcl/' test/tester.tcl
grep -q harness.tcl test/tester.tcl
sed -i 's/journal_mode=MEMORY/journal_mode=DELETE/; s/journal_mode=OFF/journal_mode=DELETE/' mptest/config01.test
sed -i 's/{\$i<10000 && /{$i<1000 \&\& /' test/walcrash3.test # of ten thousand crashes, a quarter of an hour
grep -q '{$i<1000 && ' test/walcrash3.test
cp "$harness" test/
touch built
