"""Stands in for cOTA, the over-the-air updater of CircuitPython boards: does over HTTP what it does, in its order.

Reads what the device is to have, and if title or version differ from what it has, fetches the tree of a repository
that it takes to be on GitHub, checks each file by its git name, replaces the board's files, and says so. Its HTTP is
that of a small board: a socket, a reason in the status line, a colon and a space in each header, no compression, `Host`
without a port.
"""

import argparse
import hashlib
import json
import os
import shutil
import socket
import ssl
import sys

KEPT = {"main.py", "boot.py", "settings.toml", "lib", "tmp"}


class Line:
    """A connection to one host, which stays."""

    def __init__(self, address, host, tls=None):
        self.host = host
        host_name, port = address.rsplit(":", 1)
        self.socket = socket.create_connection((host_name, int(port)), timeout=60)
        if tls:
            # The network leads the name here; the certificate has to be for that name.
            self.socket = tls.wrap_socket(self.socket, server_hostname=host)
        self.come = b""

    def request(self, method, path, body=b""):
        head = "%s %s HTTP/1.1\r\nHost: %s\r\n" % (method, path, self.host)
        if method == "POST":
            head += "Content-Type: application/json\r\nContent-Length: %d\r\n" % len(body)
        self.socket.sendall(head.encode() + b"\r\n" + body)
        version, status, reason = self.line().split(" ", 2)
        assert version == "HTTP/1.1" and reason, "a status line without a reason"
        length = None
        while True:
            line = self.line()
            if not line:
                break
            name, value = line.split(": ", 1)
            assert name.lower() not in ("content-encoding", "transfer-encoding"), line
            if name.lower() == "content-length":
                length = int(value)
        return int(status), self.take(length)

    def line(self):
        while b"\r\n" not in self.come:
            self.more()
        line, self.come = self.come.split(b"\r\n", 1)
        return line.decode()

    def take(self, length):
        while len(self.come) < length:
            self.more()
        body, self.come = self.come[:length], self.come[length:]
        return body

    def more(self):
        piece = self.socket.recv(65536)
        assert piece, "the connection ended"
        self.come += piece


class Cota:
    def __init__(self, options):
        address = options.address
        self.things = Line(address, address.rsplit(":", 1)[0])
        self.token, self.root, self.corrupt = options.token, options.root, options.corrupt
        self.github, self.repository = options.github or address, options.repository
        self.tls = ssl.create_default_context(cafile=options.ca) if options.ca else None
        self.states = []

    def get(self, group):
        path = "/api/v1/%s/attributes?%sKeys=fw_title,fw_version,fw_url" % (self.token, group)
        status, body = self.things.request("GET", path)
        assert status == 200, status
        return json.loads(body).get(group, {})

    def post(self, call, values):
        body = json.dumps(values).encode()
        status, answer = self.things.request("POST", "/api/v1/%s/%s" % (self.token, call), body)
        assert (status, answer) == (200, b""), (status, answer)

    def say(self, state, **more):
        has = self.has
        self.states.append(state)
        told = {"current_fw_title": has.get("fw_title"), "current_fw_version": has.get("fw_version"), "fw_state": state}
        self.post("telemetry", dict(told, **more))

    def is_due(self):
        self.has, self.wanted = self.get("client"), self.get("shared")
        if not all(key in self.wanted for key in ("fw_title", "fw_version", "fw_url")):
            return False
        return any(self.has.get(key) != self.wanted[key] for key in ("fw_title", "fw_version"))

    def check(self):
        if not self.is_due():
            return
        self.is_due()
        self.say("DOWNLOADING")
        try:
            self.fetch()
        except ValueError as error:
            self.say("FAILED", fw_error=str(error))
            return
        for state in ("VERIFIED", "DOWNLOADED", "UPDATING"):
            self.say(state)
        self.replace()
        self.post("attributes", {key: self.wanted[key] for key in ("fw_title", "fw_version", "fw_url")})
        self.say("UPDATED")

    def fetch(self):
        rest = self.wanted["fw_url"].split("://", 1)[1].rstrip("/").split("/")
        if rest[0] != "github.com" or len(rest) < 3:
            raise ValueError("no such address: " + self.wanted["fw_url"])
        repository = self.repository or "/".join(rest[1:3])
        api = Line(self.github, "api.github.com", self.tls)
        status, tree = api.request("GET", "/repos/%s/git/trees/main?recursive=1" % repository)
        blobs = [entry for entry in json.loads(tree).get("tree", []) if entry["type"] == "blob"]
        if status != 200 or not blobs:
            raise ValueError("there is no tree")
        raw = Line(self.github, "raw.githubusercontent.com", self.tls)
        shutil.rmtree(os.path.join(self.root, "tmp"), ignore_errors=True)
        for entry in blobs:
            path = "/%s/main/%s" % (repository, entry["path"].replace(" ", "%20"))
            status, content = raw.request("GET", path)
            if entry["path"] == self.corrupt:
                content = b"?" + content[1:]
            sha = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            if status != 200 or sha != entry["sha"]:
                raise ValueError("%s is not what the tree says" % entry["path"])
            place = os.path.join(self.root, "tmp", entry["path"])
            os.makedirs(os.path.dirname(place), exist_ok=True)
            with open(place, "wb") as file:
                file.write(content)

    def replace(self):
        for name in os.listdir(self.root):
            place = os.path.join(self.root, name)
            if name in KEPT:
                continue
            shutil.rmtree(place) if os.path.isdir(place) else os.remove(place)
        new = os.path.join(self.root, "tmp")
        for folder, _, names in os.walk(new):
            for name in names:
                place = os.path.join(self.root, os.path.relpath(os.path.join(folder, name), new))
                os.makedirs(os.path.dirname(place), exist_ok=True)
                os.replace(os.path.join(folder, name), place)
        shutil.rmtree(new)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("token")
    parser.add_argument("--root", required=True)
    parser.add_argument("--corrupt", help="a file that is garbled on its way")
    parser.add_argument("--github", help="where GitHub is, if it is elsewhere")
    parser.add_argument("--ca", help="the CA that vouches for it, over TLS")
    parser.add_argument("--repository", help="another repository than the one that was named")
    options = parser.parse_args()
    board = Cota(options)
    board.check()
    json.dump({"states": board.states}, sys.stdout)


if __name__ == "__main__":
    main()
