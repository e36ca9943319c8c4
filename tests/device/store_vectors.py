"""Reads the golden vectors of the device's store.

    micropython store_vectors.py VECTORS SCRATCH
"""

import io
import json
import os
import sys

from bench import *
from mpypi import boot, wheel
from mpypi.paths import check_path
from mpypi.records import parents


def load(name):
    with open(name) as file:
        return json.load(file)


def refused(act, *args):
    """Whether it raises what means no."""
    try:
        act(*args)
    except (ValueError, wheel.BadWheel, wheel.Escapes):
        return True
    return False


def paths(cases):
    for case in cases["valid"]:
        check_path(case["path"])
        assert list(parents(case["path"])) == case["parents"], case
    for case in cases["invalid"]:
        assert refused(check_path, case["path"]), case
    return len(cases["valid"]) + len(cases["invalid"])


def record(cases):
    def lines(case):
        return list(wheel.record_lines(io.BytesIO(case["text"].encode())))

    def headers(case):
        return [list(header) for header in wheel.header_lines(io.BytesIO(case["text"].encode()))]

    for case in cases["valid"]:
        expected = [(line["path"], line["sha256"], line["size"]) for line in case["lines"]]
        assert lines(case) == expected, (case, lines(case))
    for case in cases["invalid"]:
        assert refused(lines, case), case
    for case in cases["headers"]:
        assert headers(case) == case["headers"], (case, headers(case))
    for case in cases["invalid_headers"]:
        assert refused(headers, case), case
    return len(cases["valid"]) + len(cases["invalid"])


def put(root, files):
    os.mkdir(root)
    for path in files:
        for folder in parents(path):
            if boot.kind(root + "/" + folder) == boot.NONE:
                os.mkdir(root + "/" + folder)
        if not path.endswith("/"):
            write(root + "/" + path, files[path].encode())


def everything(root, top=""):
    """Every file with its text; empty folders as `name/`, but for the agent's own."""
    found = {}
    for entry in os.ilistdir(root + "/" + top):
        name = top + entry[0]
        if entry[1] == 0x4000:
            inside = everything(root, name + "/")
            if not inside and not name.startswith(".mpypi"):
                inside = {name + "/": ""}
            found.update(inside)
        else:
            with open(root + "/" + name) as file:
                found[name] = file.read()
    return found


def records(cases, root):
    os.mkdir(root)
    os.mkdir(root + "/.mpypi")
    for case in cases["records"]:
        # What is read and written again is the same; records of many lines are only read here.
        path = root + "/.mpypi/" + case["record"]
        write(path, case["text"].encode())
        found = boot.header(path)
        if case["record"] == "journal.json":
            boot.write_journal(root, found)
        elif case["record"] == "seen.json":
            boot.write_seen(root, found)
        else:
            expected = [json.loads(line) for line in case["text"].split("\n")[1:-1]]
            assert list(boot.lines(path)) == expected, case
        with open(path) as file:
            assert file.read() == case["text"], case
    for case in cases["invalid"]:
        path = root + "/.mpypi/" + case["record"]
        write(path, case["text"].encode())
        # A start does not guess.
        if case["record"] in ("journal.json", "seen.json"):
            assert refused(boot.start, root), case
            os.remove(path)
        else:
            assert refused(boot.header, path), case
    remove_tree(root)
    return len(cases["records"]) + len(cases["invalid"])


def starts(cases, root):
    for case in cases["starts"]:
        put(root, case["files"])
        word = wake(root)[1][0]
        assert word == case["found"], (case["name"], word)
        found = everything(root)
        after = case["after"]
        wrong = [name for name in set(list(found) + list(after)) if found.get(name) != after.get(name)]
        wrong = [(name, found.get(name), after.get(name)) for name in wrong]
        assert not wrong, "%s: %s" % (case["name"], wrong)
        remove_tree(root)
    return len(cases["starts"])


def main(vectors, scratch):
    print("paths", paths(load(vectors + "/paths.json")))
    print("record", record(load(vectors + "/wheel_record.json")))
    flash = load(vectors + "/flash.json")
    print("records", records(flash, scratch + "/flash"))
    print("starts", starts(flash, scratch + "/flash"))


main(*sys.argv[1:])
