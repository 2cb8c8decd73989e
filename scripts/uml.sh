#!/usr/bin/env bash
# Runs tests of e2e in a Linux kernel of its own, which needs no virtual machine:
# Debian's user-mode-linux, whose modules have what this machine's kernel may lack.
# Usage: uml.sh REGEXP NAME...   each NAME is a test that must have passed there
set -euo pipefail
cd "$(dirname "$0")/.."
command -v linux.uml >/dev/null || { echo "uml: apt-get install user-mode-linux" >&2; exit 1; }
command -v modprobe >/dev/null || { echo "uml: apt-get install kmod" >&2; exit 1; }
[ "$(id -u)" = 0 ] || { echo "uml: run it as root" >&2; exit 1; }

tests=$1; shift
work=$(mktemp -d /var/tmp/uml.XXXXXX)
trap 'rm -rf "$work"' EXIT
go=${GO:-go}
CGO_ENABLED=0 $go test -c -o "$work/e2e.test" ./e2e
CGO_ENABLED=0 $go build -o "$work/litefs-agent" .
truncate -s 2G "$work/disk"
mkdir "$work/lib"
ln -s /usr/lib/uml/modules "$work/lib/modules"
mkfs.ext4 -q -F "$work/disk"

# Process 1 of that kernel. Its root is this machine's, read-only.
cat >"$work/init" <<INIT
#!/bin/bash
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C
mount -t proc p /proc; mount -t sysfs s /sys
mount -t tmpfs t /run; mount -t tmpfs t /mnt
mountpoint -q /dev || mount -t devtmpfs d /dev
for module in fuse loop f2fs vfat xfs btrfs overlay nls_ascii nls_cp437 nls_utf8 nls_iso8859-1; do modprobe -q -d "$work" \$module; done
mkdir /mnt/disk; mount -t ext4 /dev/ubda /mnt/disk && chmod 1777 /mnt/disk
ip link set lo up
echo "kernel \$(uname -r)"
cd "$PWD/e2e"
TMPDIR=/mnt/disk "$work/e2e.test" -program "$work/litefs-agent" -test.v -test.timeout 20m -test.run '$tests'
echo "status \$?"
umount /mnt/disk
echo o >/proc/sysrq-trigger; sleep 5
INIT
chmod +x "$work/init"
TMPDIR=$work timeout 1500 linux.uml mem=1G root=/dev/root rootfstype=hostfs rootflags=/ ro ubd0="$work/disk" \
	init="$work/init" con=null con0=fd:0,fd:1 loglevel=1 </dev/null 2>&1 | tr -d '\r' | tee "$work/out" || true
grep -q '^status 0$' "$work/out" || { echo "uml: the tests failed" >&2; exit 1; }
for name in "$@"; do
	grep -q -- "--- PASS: $name " "$work/out" || { echo "uml: $name did not run" >&2; exit 1; }
done
