#!/usr/bin/env bash
# Runs the README's commands as they stand there, but for the broker's address: a free port, a scratch folder.
set -euo pipefail
cd "$(dirname "$0")/.."

scratch=$(mktemp -d)
jobs_started=()
finish() {
  for job in "${jobs_started[@]}"; do kill -TERM -- "-$job" 2> /dev/null || true; done
  wait
  rm -rf "$scratch" node/readme
}
trap finish EXIT
trap 'exit 130' INT TERM

fail() {
  echo "error: $1" >&2
  tail -n 40 "$scratch"/*.log >&2 || true
  exit 1
}

# Every `$ make …` line of the README, without its comment.
mapfile -t commands < <(sed -nE 's/^\$ (make [^#]*[^# ]) *(#.*)?$/\1/p' README.md)
has() {
  local command
  for command in "${commands[@]}"; do [ "$command" != "$1" ] || return 0; done
  fail "the README does not say \`$1\` any more: change both"
}

# Starts a command in a process group of its own, as a terminal would; its output goes to NAME.log.
start() { # NAME COMMAND...
  local name=$1
  shift
  set -m
  "$@" > "$scratch/$name.log" 2>&1 &
  set +m
  jobs_started+=("$!")
}

# Waits until NAME.log has COUNT lines that match PATTERN; fails if the command ends before.
await() { # NAME COUNT PATTERN
  local job=${jobs_started[-1]}
  timeout 300 tail -n +1 -F --pid="$job" "$scratch/$1.log" 2> /dev/null | grep -m "$2" -E "$3" > "$scratch/found" || true
  [ "$(wc -l < "$scratch/found")" -eq "$2" ] || fail "\`$1\` did not say \`$3\` $2 times"
}

stop() { # the newest one, as Ctrl-C does
  local job=${jobs_started[-1]}
  unset 'jobs_started[-1]'
  kill -INT -- "-$job"
  wait "$job" || true
}

# The first screen shows what the demo says, but for the digits.
has 'make demo'
make demo > "$scratch/demo.log" || fail '`make demo` failed'
plain() { sed -E 's/[0-9]+/0/g; s/ +/ /g'; }
plain < "$scratch/demo.log" > "$scratch/demo"
awk '/^```/ { n++ } n == 1 && !/^(```|\$|…|$)/' README.md | plain > "$scratch/screen"
[ -s "$scratch/screen" ] || fail 'the README does not start with the demo'
while IFS= read -r line; do
  grep -qxF -e "$line" "$scratch/demo" || fail "the demo does not say: $line"
done < "$scratch/screen"
echo "demo: says what the README says"

# `make broker` listens on the one port that everybody uses, so only here it is run by hand.
has 'make broker'
start broker "${CARGO_TARGET_DIR:-target}/debug/mpypi-broker" serve --listen 127.0.0.1:0 --data "$scratch/index"
await broker 1 '^listening on '
export BROKER
BROKER=$(sed -n 's/^listening on //p' "$scratch/broker.log")

has 'make publish CHANNEL=dev'
make publish CHANNEL=dev | tee "$scratch/publish.log"
grep -q '^published dev release 1 ' "$scratch/publish.log" || fail '`make publish` published nothing'

has 'make fleet NODES=50'
start fleet make fleet NODES=50
await fleet 50 'release 1  applied'
stop
echo "fleet: 50 applied"

has 'make agent'
start agent make agent NODE=readme
await agent 1 'release 1  applied'
[ -f node/readme/main.py ] || fail '`make agent` left no main.py in node/readme'
stop
echo "agent: applied"

has 'make watch CHANNEL=dev'
start watch make watch CHANNEL=dev
await watch 1 'up to date at release 1'
stop
echo "watch: up to date"

has 'make status'
make status | tee "$scratch/status.log"
grep -q '^dev: release 1 ' "$scratch/status.log" || fail '`make status` does not show the release'

for command in help test bench ci; do
  has "make $command"
  grep -q "^$command:" Makefile || fail "the Makefile has no target \`$command\`"
done
echo "the README's commands work"
