#!/usr/bin/env bash
# Installs what the tests and the demo need and this Debian lacks. Says nothing
# and needs no rights when nothing is missing. Usage: setup.sh [test] [race] [arm] [bench] [sqlite]
#   test  tools for the file systems that the data folder is tested on, and strace
#   race  a C compiler, for the race detector      arm  qemu-arm, to run ARM code
#   bench  a C compiler, strace, tools for loop devices
#   sqlite  a C compiler, make and Tcl, to build SQLite's own test programs
set -euo pipefail

as_root() {
	if [ "$(id -u)" = 0 ]; then
		"$@"
	elif command -v sudo >/dev/null; then
		sudo "$@"
	else
		echo "setup: needs root or sudo for: $*" >&2
		exit 1
	fi
}

packages=()
need() { command -v "$1" >/dev/null || packages+=("$2"); } # COMMAND PACKAGE
PATH=$PATH:/usr/sbin:/sbin

need sqlite3 sqlite3
need fusermount3 fuse3
need git git
for group in "$@"; do
	case $group in
	test)
		need mkfs.ext4 e2fsprogs; need losetup mount; need mkfs.xfs xfsprogs; need mkfs.btrfs btrfs-progs
		need mkfs.f2fs f2fs-tools; need mkfs.vfat dosfstools
		need strace strace
		;;
	race) need gcc gcc; [ -e /usr/include/stdlib.h ] || packages+=(libc6-dev) ;;
	arm) need qemu-arm qemu-user ;;
	bench)
		need gcc gcc; [ -e /usr/include/stdlib.h ] || packages+=(libc6-dev)
		need strace strace; need mkfs.ext4 e2fsprogs; need losetup mount; need findmnt util-linux
		;;
	sqlite)
		need gcc gcc; need make make; need tclsh8.6 tcl8.6; need xz xz-utils
		[ -e /usr/include/stdlib.h ] || packages+=(libc6-dev)
		[ -e /usr/lib/tcl8.6/tclConfig.sh ] || packages+=(tcl8.6-dev)
		[ -e /usr/include/zlib.h ] || packages+=(zlib1g-dev)
		;;
	*) echo "setup: unknown group $group" >&2; exit 2 ;;
	esac
done

# What every Debian but a minimal tree has, and fusermount3 reads.
[ -e /etc/mtab ] || as_root ln -s ../proc/self/mounts /etc/mtab

if ! command -v go >/dev/null; then
	echo "setup: no 'go' in PATH: install the release that go.mod names ($(awk '$1=="go"{print $2}' "$(dirname "$0")/../go.mod")) from go.dev/dl" >&2
	exit 1
fi

if [ ${#packages[@]} -gt 0 ]; then
	if ! command -v apt-get >/dev/null; then
		echo "setup: not a Debian; install by hand what has the place of: ${packages[*]}" >&2
		exit 1
	fi
	echo "setup: installing ${packages[*]}" >&2
	apt() { as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=300 "$@" </dev/null >/dev/null; }
	# An old package list names files that are gone: fetch a new one and try again.
	apt install -y --no-install-recommends "${packages[@]}" 2>/dev/null ||
		{ apt update && apt install -y --no-install-recommends "${packages[@]}"; }
fi

if [ ! -e /dev/fuse ]; then # a container, or the module is not loaded
	as_root modprobe -q fuse 2>/dev/null || true
	[ -e /dev/fuse ] || as_root sh -c 'mknod /dev/fuse c 10 229 && chmod 0666 /dev/fuse' || {
		echo "setup: /dev/fuse is missing and could not be made: start the container with --device /dev/fuse" >&2
		exit 1
	}
fi
