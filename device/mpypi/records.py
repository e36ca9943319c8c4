"""What is read line by line: what is installed, and names in folders of ours."""

import json
import os

from .files import FILE, INSTALLED, _buffer, digest, kind, piece, write


def records(path):
    """The objects in the lines of a file."""
    with open(path, "rb") as file:
        while True:
            line = file.readline()
            if not line:
                return
            yield json.loads(line)


def installed(root):
    """The lines of what is installed, without the header."""
    if kind(root + INSTALLED) == FILE:
        for line in records(root + INSTALLED):
            if "format" not in line:
                yield line


def intact(root, entry):
    """Whether the device has all files of a wheel, unchanged."""
    known = False
    good = True
    for line in installed(root):
        if line.get("wheel") == entry["name"]:
            if "version" in line:
                known = line["digest"] == entry["pkg_sha256"]
            elif known and good:
                good = digest(root + "/" + line["file"]) == line["digest"]
    return known and good


def names(path):
    """The names in a folder of ours, a few at a time: what is removed meanwhile must not confuse the file
    system."""
    last = ""
    while True:
        some = []
        for entry in os.ilistdir(path):
            if entry[0] > last:
                some.append(entry[0])
                if len(some) > 16:
                    some.sort()
                    some.pop()
        some.sort()
        for name in some:
            yield name
        if len(some) < 16:
            return
        last = some[-1]


def parents(path):
    """The folders the file lies in, outermost first: `a`, `a/b` for `a/b/c.py`."""
    end = path.find("/")
    while end > 0:
        yield path[:end]
        end = path.find("/", end + 1)


def copy(source, target):
    """Copies a file; `target` is durable before it has its name."""
    beside = target + ".part"
    with open(source, "rb") as file, open(beside, "wb") as out:
        while True:
            length = file.readinto(_buffer)
            if not length:
                break
            write(out, piece[:length])
        out.flush()
    os.rename(beside, target)
