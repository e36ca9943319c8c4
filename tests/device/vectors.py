"""Holds the agent against the golden vectors in the folder that is its first argument; the second is a file
to write to. Says each case that is not as it should be, and how many there were.
"""

import binascii
import json
import sys

from mpypi import lists, names, paths, rsa, tags
from mpypi.files import topic
from mpypi.refusal import Refused

folder, scratch = sys.argv[1:]
count = 0


def cases(file, key):
    global count
    with open(folder + "/" + file) as vectors:
        found = json.load(vectors)[key]
    count += len(found)
    return found


def wrong(*what):
    print("wrong:", *what)


def refuses(function, *arguments):
    try:
        function(*arguments)
        return False
    except (Refused, ValueError):
        return True


def read(data):
    with open(scratch, "wb") as file:
        file.write(data)
    return lists.check(scratch, lambda tag: 1)


# Lists.
for case in cases("lists.json", "valid"):
    read(case["text"].encode())
    packages = []
    for entry in lists.read(scratch):
        if entry["type"] in ("wheel", "src"):
            packages.append((topic(entry), entry.get("size")))
        elif entry["type"] == "firmware":
            packages.append(("mpypi/packages/firmware/" + entry["pkg_sha256"], entry.get("size")))
    if packages != [(package["topic"], package["size"]) for package in case["packages"]]:
        wrong("packages", case["name"], packages)
for case in cases("lists.json", "invalid"):
    if not refuses(read, case["text"].encode()):
        wrong("taken", case["name"])
# What is skipped need not be all that JSON wants it to be: see `lists`.
LENIENT = ("number too great", "a lone surrogate")
for case in cases("lists.json", "not_json"):
    if refuses(read, case["text"].encode()) == (case["name"] in LENIENT):
        wrong("not json", case["name"])
for case in cases("lists.json", "not_json_bytes"):
    if not refuses(read, binascii.unhexlify(case["hex"])):
        wrong("not json", case["name"])

# Paths, and their topics.
for case in cases("paths.json", "valid"):
    if refuses(paths.check_path, case["path"]):
        wrong("refused", case)
for case in cases("paths.json", "invalid"):
    if not refuses(paths.check_path, case["path"]):
        wrong("taken", case)
for case in cases("paths.json", "invalid_in_topics"):
    entry = {"type": "src", "path": case["path"], "pkg_sha256": "0" * 64}
    if refuses(paths.check_path, case["path"]) or not refuses(read, json.dumps([entry]).encode()):
        wrong("in a topic", case)

# Topics: this agent makes them, and compares what comes with what it made.
for case in cases("topics.json", "valid"):
    kind, name = case["kind"], case["topic"]
    if kind == "channel" and "mpypi/channels/" + names.channel(case["channel"]) != name:
        wrong("channel", case)
    elif kind == "node" and "mpypi/nodes/%s/%s" % (names.node(case["node"]), case["subject"]) != name:
        wrong("node", case)
    elif kind in ("wheel", "src"):
        if topic({"type": kind, "path": case.get("path"), "pkg_sha256": case["digest"]}) != name:
            wrong("package", case)
for case in cases("topics.json", "invalid"):
    parts = case["topic"].split("/")
    if "is no channel name" in case["error"] and not refuses(names.channel, parts[2]):
        wrong("taken", case)
    elif "is no node name" in case["error"] and not refuses(names.node, parts[2]):
        wrong("taken", case)

# Tags.
for case in cases("tags.json", "fits"):
    rank = tags.rank(case["tag"], case["mpy"], case["platform"])
    found = (None, "source", "bytecode", "native")[min(rank >> 1, 3)]
    if found != case["fit"]:
        wrong("fit", case, found)
for case in cases("tags.json", "choices"):
    best, place = 0, None
    for at, tag in enumerate(case["tags"]):
        rank = tags.rank(tag, case["mpy"], case["platform"])
        if rank > best:
            best, place = rank, at
    if place != case["choice"]:
        wrong("choice", case, place)
for case in cases("tags.json", "runtimes"):
    if tags.best(case["mpy"], case["platform"]) != case["tag"]:
        wrong("runtime", case)
for case in cases("tags.json", "platforms"):
    if tags.platform(case["sysname"]) != case["platform"]:
        wrong("platform", case)

# Signatures.
keys = cases("signatures.json", "keys")
for case in cases("signatures.json", "lists"):
    with open(scratch, "wb") as file:
        file.write(case["text"].encode())
    word = None
    try:
        rsa.check(scratch, keys)
    except Refused as refused:
        word = refused.word
    if word != case["refused"]:
        wrong("signature", case["name"], word)
for case in cases("signatures.json", "blocks"):
    block = [binascii.unhexlify(case[key]) for key in ("modulus", "digest", "signature")]
    if rsa.is_good(*block) != case["good"]:
        wrong("block", case["name"])
print(count)
