#!/usr/bin/env bash
# Runs a command (default: make demo) in a fresh Debian 12 that has only git,
# make, curl and this machine's Go release: what a new user's machine is.
# Usage: scripts/fresh.sh [COMMAND...]     Root, on Debian; a minute the first time.
# The tree is kept in .build/fresh.tar. The sources are those of HEAD.
set -euo pipefail
cd "$(dirname "$0")/.."
[ "$(id -u)" = 0 ] || { echo "fresh.sh: must be root: it makes a Debian tree and mounts in it" >&2; exit 2; }
[ $# -gt 0 ] || set -- make demo

need=()
command -v mmdebstrap >/dev/null || need+=(mmdebstrap)
command -v systemd-nspawn >/dev/null || need+=(systemd-container)
if [ ${#need[@]} -gt 0 ]; then
  apt-get update -q >/dev/null
  DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${need[@]}" >/dev/null
fi

tar=.build/fresh.tar
mkdir -p .build
if [ ! -e "$tar" ]; then
  echo "fresh.sh: making the Debian tree" >&2
  mirror=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' 'Release: bookworm' | sort -u | head -1)
  mmdebstrap --quiet --variant=minbase --include=git,make,curl,ca-certificates --format=tar bookworm "$tar.tmp" "$mirror"
  mv "$tar.tmp" "$tar"
fi

work=$(mktemp -d "$PWD/.build/fresh.XXXXXX")
trap 'rm -rf --one-file-system "$work"' EXIT
mkdir "$work/root"
tar -C "$work/root" -xf "$tar"
cp -rL "$(go env GOROOT)" "$work/root/usr/local/go"
git clone -q --no-hardlinks . "$work/root/src"
cp -L /etc/resolv.conf "$work/root/etc/resolv.conf"
cp -a /etc/apt/apt.conf.d/. "$work/root/etc/apt/apt.conf.d/" 2>/dev/null || true
# Whom this machine trusts, as where a proxy signs for the module mirror.
cp -L /etc/ssl/certs/ca-certificates.crt "$work/root/etc/ssl/certs/ca-certificates.crt"
# The node that udev makes: mode 0666. The machine's own may differ.
mknod "$work/fuse" c 10 229
chmod 666 "$work/fuse"

env=()
for name in GOPROXY GOSUMDB GOFLAGS GONOSUMDB http_proxy https_proxy no_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY; do
  value=$(go env "$name" 2>/dev/null || true)
  [ -n "$value" ] || value=${!name:-}
  [ -z "$value" ] || env+=("--setenv=$name=$value")
done

# A private mount namespace, since nspawn wants to make mounts of its own.
unshare -m --propagation private systemd-nspawn -q --register=no --keep-unit -D "$work/root" \
  --bind="$work/fuse:/dev/fuse" --capability=CAP_SYS_ADMIN \
  --setenv=PATH=/usr/local/go/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
  --setenv=HOME=/root "${env[@]}" --chdir=/src --console=pipe "$@" </dev/null \
  2> >(grep -v 'Attempted to remove disk file system' >&2) # what nspawn says when it is not in the machine's own mount namespace
