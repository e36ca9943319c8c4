# A stand-in for both editions of ota-promoter's MicroPython client, written from what is known of them: the first
# speaks HTTP/1.0 on a socket and fetches `/files/<checksum>`, the second HTTP/1.1 with `Connection: close` and fetches
# `/file/<checksum>`. Both know each file by its checksum, fetch only what they do not have, into a folder beside, and
# then move. Neither understands chunks; both take a file for text.
#
#   micropython client.py EDITION HOST PORT BASE ROOT
#
# prints one JSON line: whether it updated, and every path it asked for. Exit code 1, and the error, if it failed.

import json
import os
import socket
import sys

EDITION, HOST, PORT, BASE, ROOT = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5]
STATE = ROOT + "/.files"
BESIDE = ROOT + "/.next"
asked = []


def request(path):
    asked.append(path)
    connection = socket.socket()
    connection.connect(socket.getaddrinfo(HOST, PORT)[0][-1])
    if EDITION == "first":
        head = "GET %s HTTP/1.0\r\n\r\n"
    else:
        head = "GET %s HTTP/1.1\r\nHost: " + HOST + "\r\nConnection: close\r\n\r\n"
    connection.write((head % path).encode())
    status = int(connection.readline().split(b" ")[1])
    length = None
    while True:
        line = connection.readline()
        if line in (b"", b"\r\n"):
            break
        name, value = line.split(b": ", 1)
        name = name.lower()
        if name == b"transfer-encoding":
            raise ValueError("chunks are not understood")
        if name == b"content-length":
            length = int(value)
    body = connection.read(length) if length is not None else connection.read()
    if length is not None and len(body) != length:
        raise ValueError("%d of %d bytes came" % (len(body), length))
    if connection.read(1):
        raise ValueError("the connection goes on")
    connection.close()
    if status != 200:
        raise ValueError("%d: %s" % (status, body.decode()))
    return body


def load():
    try:
        with open(STATE) as file:
            return json.load(file)
    except OSError:
        return {"files": [], "version": ""}


def folders(path):
    for end in [at for at in range(len(path)) if path[at] == "/"]:
        try:
            os.mkdir(path[:end])
        except OSError:
            pass


def update():
    mine = load()
    if json.loads(request(BASE + "/files/version"))["version"] == mine["version"]:
        return False
    theirs = json.loads(request(BASE + "/files"))
    known = set(file["checksum"] for file in mine["files"])
    fetched = []
    for file in theirs["files"]:
        if file["checksum"] not in known:
            place = "/files/" if EDITION == "first" else "/file/"
            text = request(BASE + place + file["checksum"]).decode()
            beside = BESIDE + "/" + file["path"]
            folders(beside)
            with open(beside, "w") as target:
                target.write(text)
            fetched.append((beside, ROOT + "/" + file["path"]))
    # From here on, the device has the new version.
    wanted = set(file["path"] for file in theirs["files"])
    for file in mine["files"]:
        if file["path"] not in wanted:
            os.remove(ROOT + "/" + file["path"])
    for beside, target in fetched:
        folders(target)
        os.rename(beside, target)
    with open(STATE, "w") as file:
        json.dump(theirs, file)
    return True


try:
    updated = update()
except Exception as error:
    print(json.dumps({"error": str(error), "asked": asked}))
    sys.exit(1)
print(json.dumps({"updated": updated, "asked": asked}))
