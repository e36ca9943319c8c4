#!/usr/bin/env bash
# Makes sure that the tests find nats-server 2.10 or later, whose clusters keep retained messages on several machines.
#
# One that is installed and new enough is taken. Where there is none, Debian's package of trixie is unpacked into
# target/peers, from the mirror that apt knows and checked by its hash: no root, no service started, nothing changed
# outside this folder. Other systems' own package is taken if it is new enough.
set -euo pipefail
cd "$(dirname "$0")/.."

peers="$PWD/target/peers"
suite=trixie
version=2.10.27-1+b2
# One line for each architecture that was tried.
hashes="amd64 6d913ac987b78734c08537c2adeb1526cf735f216173a9170d94b185fcfe6f8a"

give_up() {
  echo "error: $1" >&2
  echo "hint: install nats-server 2.10 or later and put it on PATH" >&2
  exit 1
}

# 2.9 refuses dots in topics, and package topics have some.
is_new_enough() {
  [[ "$("$1" --version 2> /dev/null)" =~ v2\.([0-9]+)\. ]] && [ "${BASH_REMATCH[1]}" -ge 10 ]
}

if installed=$(PATH="$PATH:/usr/sbin:/usr/local/sbin" command -v nats-server); then
  is_new_enough "$installed" && exit 0
fi
[ ! -x "$peers/nats-server" ] || exit 0
command -v apt-get > /dev/null && command -v dpkg-deb > /dev/null ||
  give_up "nats-server 2.10 is not installed, and there is no apt-get to fetch it with"

echo "fetching nats-server into target/peers"
folder="$peers/nats"
rm -rf "$folder"
mkdir -p "$folder"/apt/{lists,archives}/partial "$folder"/apt/parts
cd "$folder"
own_apt() {
  apt-get -qq -o Debug::NoLocking=1 -o Dir::State::Lists="$folder/apt/lists" -o Dir::Cache="$folder/apt" \
    -o APT::Sandbox::User="" -o Acquire::Languages=none -o Acquire::Retries=3 "$@"
}

arch=$(dpkg --print-architecture)
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 'Component: main' |
  grep -v security | head -n 1)
hash=$(awk -v arch="$arch" '$1 == arch { print $2 }' <<< "$hashes")
if [ -n "$mirror" ] && [ -n "$hash" ]; then
  echo "deb [arch=$arch] $mirror $suite main" > apt/sources.list
  trixie=(-o Dir::Etc::SourceList="$folder/apt/sources.list" -o Dir::Etc::SourceParts="$folder/apt/parts"
    -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false)
  own_apt "${trixie[@]}" update || give_up "apt-get could not fetch the list of $suite's packages"
  own_apt "${trixie[@]}" download "nats-server=$version" || give_up "apt-get could not fetch nats-server $version"
  sha256sum --quiet --check <<< "$hash  $(echo nats-server_*.deb)" ||
    give_up "the package is not the one that was tried"
else
  own_apt update || give_up "apt-get could not fetch the lists of packages"
  own_apt download nats-server || give_up "apt-get could not fetch nats-server"
fi
dpkg-deb --extract nats-server_*.deb root
rm -rf apt nats-server_*.deb
is_new_enough root/usr/sbin/nats-server || give_up "this nats-server does not run here, or is older than 2.10"
ln -sf nats/root/usr/sbin/nats-server "$peers/nats-server"
