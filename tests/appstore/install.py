"""Installs a package by the App Store API of a device: `install.py URL PACKAGE`.

Written from the API's description; asks for the installation right after the download, and follows its log by ranges
until there is no more.
"""

import json
import sys
import time
import urllib.request

url, package = sys.argv[1:]


def post(path, body):
    request = urllib.request.Request(f"{url}/app_store/{path}", json.dumps(body).encode(), method="POST")
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


assert post("services/refresh_store", {}) == {"status": 200}
post("services/download_packages", {"packages": [package]})
task = post("services/install_packages", {"packages": [package]})[package]["task_id"]
print("task", task, flush=True)

start = 0
while True:
    path = f"{url}/app_store/jobs/install/tasks/{task}/log?start={start}"
    with urllib.request.urlopen(path) as answer:
        text = answer.read().decode()
        more = answer.headers["X-MORE-DATA"] == "true"
    sys.stdout.write(text)
    start += len(text)
    if not more:
        break
    if not text:
        time.sleep(0.1)
