#!/usr/bin/env bash
# Unpacks Debian's nginx into target/peers, for the benchmark of downloads: no root, no service started.
set -euo pipefail
cd "$(dirname "$0")/.."

peers="$PWD/target/peers"
[ ! -x "$peers/nginx" ] || exit 0
command -v nginx > /dev/null && exit 0
command -v apt-get > /dev/null && command -v dpkg-deb > /dev/null || {
  echo "error: nginx is not installed, and there is no apt-get to fetch it with" >&2
  echo "hint: install nginx" >&2
  exit 1
}
mkdir -p "$peers/nginx-root"
cd "$peers/nginx-root"
apt-get -qq -o APT::Sandbox::User="" download nginx
dpkg-deb --extract nginx_*.deb .
rm nginx_*.deb
./usr/sbin/nginx -v
ln -s nginx-root/usr/sbin/nginx "$peers/nginx"
