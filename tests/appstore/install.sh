#!/usr/bin/env bash
# Installs a package by the App Store API of a device: `install.sh URL PACKAGE`. Written from the API's description;
# asks for the installation right after the download, and follows its log by ranges until there is no more.
set -euo pipefail
url=$1 package=$2

post() { curl --silent --show-error --fail --request POST --data "$2" "$url/app_store/$1"; }

post services/refresh_store '' > /dev/null
post services/download_packages "{\"packages\":[\"$package\"]}" > /dev/null
task=$(post services/install_packages "{\"packages\":[\"$package\"]}" | sed -E 's/.*"task_id":([0-9]+).*/\1/')
echo "task $task"

headers=$(mktemp)
trap 'rm -f "$headers"' EXIT
start=0 more=true
while [ "$more" = true ]; do
  # Whatever comes ends in a line feed, which `$( )` would swallow.
  text=$(curl --silent --show-error --fail --dump-header "$headers" \
    "$url/app_store/jobs/install/tasks/$task/log?start=$start&end=$((start + 16))" && printf x)
  text=${text%x}
  printf '%s' "$text"
  start=$((start + ${#text}))
  more=$(tr -d '\r' < "$headers" | sed -nE 's/^x-more-data: (.*)/\1/Ip')
  [ -n "$text" ] || sleep 0.1
done
