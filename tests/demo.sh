#!/usr/bin/env bash
# One release travels from a folder through a broker to five devices, then an update of one file.
# Everything happens in a scratch folder and on a free loopback port; nothing is left behind.
set -euo pipefail
cd "$(dirname "$0")/.."

devices=5
target=${CARGO_TARGET_DIR:-target}

scratch=$(mktemp -d)
broker_pid=
finish() {
  [ -z "$broker_pid" ] || kill "$broker_pid" 2> /dev/null || true
  wait
  rm -rf "$scratch"
}
trap finish EXIT
trap 'exit 130' INT TERM

# The channel is a folder; work on a copy, since the demo changes a file in it.
cp -R channels/dev "$scratch/dev"

mkfifo "$scratch/where"
"$target/debug/mpypi-broker" serve --listen 127.0.0.1:0 --data "$scratch/index" \
  > "$scratch/where" 2> "$scratch/broker.log" &
broker_pid=$!
if ! read -r _ _ broker < "$scratch/where"; then
  cat "$scratch/broker.log" >&2
  exit 1
fi
echo "broker    $broker"

publish() {
  "$target/debug/mpypi" publish "$scratch/dev" --broker "$broker" 2> "$scratch/publish.log" |
    sed 's/^/publish   /' || { cat "$scratch/publish.log" >&2; return 1; }
}
publish

update() {
  local settings="$scratch/dev/src/settings.json"
  sed 's/"OK"/"HELLO"/' "$settings" > "$settings.new"
  mv "$settings.new" "$settings"
  echo
  echo "change    one word in settings.json, $(wc -c < "$settings" | tr -d ' ') B"
  publish
}

# The devices stay connected throughout. Each line is one device's way through one release; when all have
# applied the first, the second is published.
follow() {
  local device release phase rest applied=0
  declare -A way
  while IFS=$'\t' read -r device release phase rest; do
    case $phase in
      applied | failed | "rolled back")
        printf '%-9s %s %s%s%s\n' "$device" "$release" "${way[$device]:-}" "$phase" "$rest"
        way[$device]=
        [ "$phase" != applied ] || applied=$((applied + 1))
        [ "$applied" != "$devices" ] || [ "$release" != "release 1" ] || update
        ;;
      *) case ${way[$device]:-} in *"$phase"*) ;; *) way[$device]="${way[$device]:-}$phase › " ;; esac ;;
    esac
  done
}

echo
"$target/debug/mpypi-agent" fleet --broker "$broker" --channel dev --nodes "$devices" \
  --dir "$scratch/devices" --releases 2 --for 60s 2>&1 > "$scratch/table" |
  sed -uE 's/^(device-[0-9]+)  (release [0-9]+)  (rolled back|[a-z]+)(.*)$/\1\t\2\t\3\t\4/' | follow

echo
cat "$scratch/table"

# Only the changed file travelled, and it is what every device now has.
size=$(wc -c < "$scratch/dev/src/settings.json" | tr -d ' ')
only=$(grep -cE "^\| device-[0-9]+ +2 \(.*\) +$size +[0-9.]+ +applied" "$scratch/table" || true)
for device in "$scratch"/devices/*/; do
  cmp -s "$scratch/dev/src/settings.json" "$device/settings.json" || only=0
done
if [ "$only" != "$devices" ]; then
  echo "error: release 2 should have brought $size B to each of $devices devices" >&2
  exit 1
fi
echo
echo "release 2 brought each device settings.json alone: $size B"

kill "$broker_pid"
wait "$broker_pid"
broker_pid=
echo "all stopped"
