#!/usr/bin/env bash
# Rehearses a channel in a pipeline: a throw-away broker, a fleet of simulated devices, what is expected of them. What is to be
# rehearsed, and how, comes from the environment; reports go to a folder, to be kept as artefacts. Ends as `mpypi rehearse` does:
# 0 as expected, 3 not, 1 failed to run, 2 wrong usage.
#
#   MPYPI_CHANNEL   the channel's folder; the only one that must be set
#   MPYPI_AGAINST   the folder of what devices have now
#   MPYPI_NODES     how many devices (200)
#   MPYPI_PROFILE   lab, home-wifi, cellular, hostile, or a TOML file (home-wifi)
#   MPYPI_SEED      decides everything random (1)
#   MPYPI_TIME      how long it may take at most (2m)
#   MPYPI_EXPECT    what is expected, one to a line (applied=100%, bricked=0)
#   MPYPI_REPORTS   the folder for the reports (fleet)
set -euo pipefail

if [ -z "${MPYPI_CHANNEL:-}" ]; then
  echo 'error: MPYPI_CHANNEL is not set: the folder of the channel to rehearse' >&2
  exit 2
fi
reports=${MPYPI_REPORTS:-fleet}
mkdir -p "$reports"

arguments=(rehearse "$MPYPI_CHANNEL"
  --nodes "${MPYPI_NODES:-200}" --profile "${MPYPI_PROFILE:-home-wifi}" --seed "${MPYPI_SEED:-1}" --for "${MPYPI_TIME:-2m}"
  --report "$reports/fleet.json" --junit "$reports/fleet.xml" --html "$reports/fleet.html")
if [ -n "${MPYPI_AGAINST:-}" ]; then
  arguments+=(--against "$MPYPI_AGAINST")
fi
while IFS= read -r expected; do
  if [ -n "$expected" ]; then
    arguments+=(--expect "$expected")
  fi
done <<< "${MPYPI_EXPECT:-}"
if [ "${GITHUB_ACTIONS:-}" = true ]; then
  arguments+=(--github)
fi

exec mpypi "${arguments[@]}"
