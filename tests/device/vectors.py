"""Holds the agent against the golden vectors in the folder that is its first argument; the second is a file
to write to. Says each case that is not as it should be, and how many there were.
"""

import binascii
import json
import os
import sys

from mpypi import chunks, clock, judge, keys, lists, names, nested, paths, query, rollout, roots, rsa, tags, told, vouch
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


class Job:
    def __init__(self, entry):
        self.chunks = (entry, 0, entry["chunks"][2])


# Packages in chunks.
for case in cases("lists.json", "chunked"):
    read(case["text"].encode())
    pieces = []
    for entry in lists.read(scratch):
        if "chunks" not in entry:
            pieces.append({"topic": topic(entry), "sha256": entry["pkg_sha256"], "size": entry["size"]})
            continue
        size, count, place = entry["chunks"]
        left = entry["size"]
        for number in range(count):
            found, place = chunks.digest(scratch, place)
            name = chunks.topic(Job(entry), number)
            pieces.append({"topic": name, "sha256": found, "size": min(size, left)})
            left -= size
    if pieces != case["pieces"]:
        wrong("chunks", case["name"], pieces)
for case in cases("lists.json", "invalid_chunks"):
    if not refuses(read, case["text"].encode()):
        wrong("taken", case["name"])
# It does not compare the chunks of one entry with those of another.
for case in cases("lists.json", "invalid_chunks_for_hosts"):
    if refuses(read, case["text"].encode()):
        wrong("refused", case["name"])
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
moduli = cases("signatures.json", "keys")
for case in cases("signatures.json", "lists"):
    with open(scratch, "wb") as file:
        file.write(case["text"].encode())
    word = None
    try:
        rsa.check(scratch, moduli)
    except Refused as refused:
        word = refused.word
    if word != case["refused"]:
        wrong("signature", case["name"], word)
for case in cases("signatures.json", "blocks"):
    block = [binascii.unhexlify(case[key]) for key in ("modulus", "digest", "signature")]
    if rsa.is_good(*block) != case["good"]:
        wrong("block", case["name"])


def word(function, *arguments):
    """The word of a refusal, or `None`."""
    try:
        function(*arguments)
    except Refused as refused:
        return refused.word


def put(text, path=scratch):
    with open(path, "wb") as file:
        file.write(text.encode())
    return path


# Roots.
payloads = cases("roots.json", "roots")
other = scratch + ".2"
for case in cases("roots.json", "pins"):
    found = word(roots.check, put(payloads[case["root"]]))
    if found != case["refused"]:
        wrong("pin", case["name"], found)
for case in cases("roots.json", "steps"):
    old, new = put(payloads[case["from"]]), put(payloads[case["to"]], other)
    found = word(roots.step, old, new, case["number"])
    if found != case["refused"]:
        wrong("step", case["name"], found)
for case in cases("roots.json", "walks"):
    put(payloads[case["pin"]])
    found = None
    while found is None:
        number = roots.version(scratch) + 1
        if str(number) not in case["retained"]:
            break
        text = payloads[case["retained"][str(number)]]
        found = word(roots.step, scratch, put(text, other), number)
        if found is None:
            put(text)
    if (roots.version(scratch), found) != (case["version"], case["refused"]):
        wrong("walk", case["name"], roots.version(scratch), found)


class Board:
    """What of an agent is looked at to believe a list."""

    keys = True
    turn = None

    def __init__(self, channel):
        self.root = scratch + ".root"
        self.folder = self.root + "/.mpypi/"
        self.channel = channel
        self.roots = [1, None, 0, None, None]


def believe(case):
    board = Board(case["channel"])
    put(payloads[case["root"]], board.root + keys.ROOT)
    seen = case["seen"]
    if seen:
        seen = {"channel": board.channel, "list": "0" * 64, "epoch": seen["epoch"], "sequence": seen["sequence"]}
    judge.now = lambda agent: case["now"] and case["now"][:19]
    release = read(case["text"].encode())["release"]
    found = {"channel": board.channel, "list": "f" * 64}
    if release:
        found["sequence"] = release["sequence"]
    time = vouch.check(board, release, found, scratch)
    judge.check(board, release, found, seen or {}, "list", time)
    if release["more"]:
        nested.release(scratch)


for folder_of_root in ("", "/.mpypi"):
    try:
        os.mkdir(scratch + ".root" + folder_of_root)
    except OSError:
        pass
for case in cases("roots.json", "lists"):
    found = word(believe, case)
    if found != case["refused"]:
        wrong("list", case["name"], found)
# This agent does not know Ed25519.
for case in cases("roots.json", "hosts"):
    if word(believe, case) != "bad-signature":
        wrong("host", case["name"])
for case in cases("roots.json", "times"):
    signers = keys.Signers(put(payloads[case["root"]], other), "time")
    try:
        found = told.check(put(case["text"]), signers, case["node"], case["nonce"])
    except Refused:
        found = None
    if found != case["time"]:
        wrong("time", case["name"], found)

# Rollouts.
LIST = '[{"type":"release","channel":"dev","sequence":1,"version":"1","rollout":%s}]'


def plan(value):
    put(LIST % json.dumps(value))
    return rollout.read(nested.release(scratch)["rollout"])


ID = "0123456789abcdef"
for case in cases("rollouts.json", "valid"):
    if refuses(plan, case["rollout"]) or plan(case["rollout"]) != plan(case["written"]):
        wrong("rollout", case)
for case in cases("rollouts.json", "invalid"):
    if not refuses(plan, case["rollout"]):
        wrong("rollout taken", case)
for case in cases("rollouts.json", "positions"):
    if rollout.position(case["id"], case["node"]) != case["position"]:
        wrong("position", case)
for case in cases("rollouts.json", "shares"):
    if rollout.share({"id": case["id"], "jitter": case["jitter"]}, case["node"]) != case["share"]:
        wrong("share", case)
for case in cases("rollouts.json", "admits"):
    found = plan({"id": case["id"], "percent": case["percent"]})
    if rollout.admits(found, case["node"], None) != case["in"]:
        wrong("admits", case)
for case in cases("rollouts.json", "percents"):
    if plan({"id": ID, "percent": case["percent"]})["percent"] != case["hundredths"]:
        wrong("percent", case)
for case in cases("rollouts.json", "invalid_percents"):
    if not refuses(plan, {"id": ID, "percent": case["percent"]}):
        wrong("percent taken", case)
for case in cases("rollouts.json", "queries"):
    facts = case["facts"]

    def fact(field):
        if field.startswith("label."):
            return facts.get("labels", {}).get(field[6:])
        return None if facts.get(field) is None else str(facts[field])

    if query.holds(case["query"], fact) != case["holds"]:
        wrong("query", case)
for case in cases("rollouts.json", "invalid_queries"):
    if not refuses(query.holds, case["query"], None):
        wrong("query taken", case)
for case in cases("rollouts.json", "windows"):
    window = plan({"id": ID, "percent": 1, "window": case["window"]})["window"]
    now = clock.seconds(case["time"])
    found = [of(window, now, case["utc_offset"]) for of in (rollout.opens_in, rollout.closes_in)]
    if found != [case["opens_in"], case["closes_in"]]:
        wrong("window", case, found)
for case in cases("rollouts.json", "invalid_windows"):
    if not refuses(plan, {"id": ID, "percent": 1, "window": case["window"]}):
        wrong("window taken", case)
for case in cases("rollouts.json", "waits"):
    now = case["now"] and clock.seconds(case["now"])
    found = rollout.wait(plan(case["rollout"]), case["node"], case["since"], now, case["utc_offset"])
    if found != case["wait"]:
        wrong("wait", case, found)
print(count)
