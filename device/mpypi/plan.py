"""Works out what has to change on the device for the release under way."""

import json
import os

from . import boot, limits
from .boot import DIRECTORY, FILE, INSTALLED, NEXT, NONE, PLAN, STAGING, kind
from .files import EMPTY, GATHERED, Filter, digest, staged_name, topic, write
from .records import copy, installed, parents, records
from .refusal import Refused, missing_package

# The agent's own folder. It stays where a release does not bring it: without it no other release would come.
AGENT = "lib/mpypi/"


async def run(agent):
    agent.changes = plan(agent.root, agent.job.seen, agent.entries)
    return "commit"


def plan(root, seen, entries):
    """Writes the plan of the journal, and what will be installed. -> how many files change"""
    tapes = Tapes(root + STAGING + "/files-")
    try:
        for line in records(root + GATHERED):
            tapes.add(line["file"], line["digest"], line.get("wheel"))
        files = tapes.sort()
        keeps_agent = _folders(root, files)
        with open(root + PLAN, "ab") as out:
            changes = _puts(root, files, out) + _removes(root, files, out, keeps_agent)
            out.flush()
        _write_next(root, seen, entries, files)
    finally:
        tapes.remove()
        os.remove(root + GATHERED)
    return changes


def _folders(root, files):
    # Writes the folders that are to be made, and refuses files that want one place. -> whether the agent
    # stays, because the release does not bring it
    keeps_agent = True
    last = ""
    last_digest = None
    above = []  # files that the path may be below
    with open(root + PLAN, "wb") as plan:
        write(plan, b'{"format":%d}\n' % boot.FORMAT)
        for line in records(files):
            path = line["file"]
            if path == last:
                if line["digest"] != last_digest:
                    text = "two packages of this release bring `%s`, with different content"
                    raise Refused("conflict", text % path)
                continue
            if path.startswith(AGENT):
                keeps_agent = False
            while above and not path.startswith(above[-1]):
                above.pop()
            for folder in above:
                if path[len(folder)] == "/":
                    text = "`%s` is a file, and `%s` needs it as a folder"
                    raise Refused("conflict", text % (folder, path))
            above.append(path)
            for folder in parents(path):
                if last.startswith(folder + "/"):
                    continue
                found = kind(root + "/" + folder)
                if found == FILE:
                    text = "`%s` is a file on this device, and `%s` needs it as a folder"
                    raise Refused("conflict", text % (folder, path))
                if found == NONE:
                    write(plan, b'{"folder":%s}\n' % json.dumps(folder).encode())
            last, last_digest = path, line["digest"]
        plan.flush()
    return keeps_agent


def _puts(root, files, plan):
    # Each put finds its own file in staging: a digest that was perhaps used already gets another copy.
    used = Filter()
    puts = 0
    last = None
    for line in records(files):
        path, wanted = line["file"], line["digest"]
        if path == last:
            continue
        last = path
        found = kind(root + "/" + path)
        if found == DIRECTORY:
            raise Refused("conflict", "`%s` is a folder on this device" % path)
        if digest(root + "/" + path) == wanted:
            continue
        first = root + staged_name(wanted)
        if kind(first) != FILE:
            if wanted != EMPTY:
                missing = topic({"type": "src", "path": path, "pkg_sha256": wanted})
                raise Refused("missing-package", "the broker has no `%s`" % missing)
            with open(first, "wb"):
                pass
        number = 0
        if used.note(wanted):
            while number == 0 or kind(root + staged_name(wanted, number)) == FILE:
                number += 1
            copy(first, root + staged_name(wanted, number))
        text = '{"put":%s,"digest":"%s","copy":%d,"had":%s}\n'
        had = "false" if found == NONE else "true"
        write(plan, (text % (json.dumps(path), wanted, number, had)).encode())
        puts += 1
    return puts


def _removes(root, files, plan, keeps_agent):
    # What is installed and not in the release. Both are sorted.
    removes = 0
    last = None
    release = records(files)
    line = next(release, None)
    for installed in _files(root):
        path = installed["file"]
        while line and line["file"] < path:
            line = next(release, None)
        if path == last or line and line["file"] == path or keeps_agent and path.startswith(AGENT):
            continue
        last = path
        if kind(root + "/" + path) == FILE:
            write(plan, b'{"remove":%s}\n' % json.dumps(path).encode())
            removes += 1
    while line:
        line = next(release, None)
    return removes


def _write_next(root, seen, entries, files):
    # What `installed.jsonl` will be.
    head = {key: seen[key] for key in seen if key not in ("refused", "created")}
    with open(root + NEXT, "wb") as out:
        write(out, ('{"format":%d,%s}\n' % (boot.FORMAT, boot.list_text(head))).encode())
        for entry in entries():
            if entry["type"] == "wheel":
                text = '{"wheel":%s,"version":%s,"digest":"%s"}\n'
                text %= (json.dumps(entry["name"]), json.dumps(entry["version"]), entry["pkg_sha256"])
                write(out, text.encode())
        with open(files, "rb") as file:
            while True:
                line = file.readline()
                if not line:
                    break
                write(out, line)
        release = records(files)
        line = next(release, None)
        for folder in _both(boot.folders(root + INSTALLED), boot.folders(root + PLAN)):
            # Ours, and still needed.
            while line and line["file"] < folder + "/":
                line = next(release, None)
            if line and line["file"].startswith(folder + "/"):
                write(out, b'{"folder":%s}\n' % json.dumps(folder).encode())
        while line:
            line = next(release, None)
        out.flush()


def _files(root):
    # The lines of what is installed that name a file.
    for line in installed(root):
        if "file" in line:
            yield line


def _both(names, others):
    # The union of two sequences of folders, each sorted as if a `/` ended its names.
    one, other = next(names, None), next(others, None)
    while one is not None or other is not None:
        if other is None or one is not None and one + "/" <= other + "/":
            yield one
            if other == one:
                other = next(others, None)
            one = next(names, None)
        else:
            yield other
            other = next(others, None)


class Tapes:
    """Sorts in bounded memory: two tapes are merged into two others, until one holds all. Lines as in
    `installed.jsonl`, sorted by path, then by wheel. Its four files begin with `prefix`."""

    def __init__(self, prefix):
        self.names = [prefix + "%d.part" % n for n in range(4)]
        self.out = self.open()
        self.at = 0
        self.last = None

    def add(self, path, digest, wheel=None):
        """Adds a file of the release."""
        key = (path, wheel or "")
        if self.last is not None and key < self.last:
            self.at ^= 1
        self.last = key
        text = '{"file":%s,"digest":"%s"' % (json.dumps(path), digest)
        if wheel is not None:
            text += ',"wheel":' + json.dumps(wheel)
        self.out[self.at].write(text.encode() + b"}\n")

    def sort(self):
        """-> the name of the file with all lines, sorted"""
        while True:
            self.close()
            first, second, third, fourth = self.names
            if not os.stat(second)[6]:
                return first
            self.names = [third, fourth, first, second]
            self.out = self.open()
            self._merge(_Run(first), _Run(second))

    def remove(self):
        """Removes the files."""
        self.close()
        for name in self.names:
            if kind(name) == FILE:
                os.remove(name)

    def open(self):
        return [open(name, "wb") for name in self.names[:2]]

    def close(self):
        for file in self.out:
            file.close()
        self.out = ()

    def _merge(self, one, other):
        at = 0
        while one.line or other.line:
            last = None
            while True:
                # What comes next in this run: the smaller of what is not behind its end.
                a = one if one.line and (last is None or one.key >= last) else None
                b = other if other.line and (last is None or other.key >= last) else None
                best = b if a is None or b is not None and b.key < a.key else a
                if best is None:
                    break
                self.out[at].write(best.line)
                last = best.key
                best.next()
            at ^= 1


class _Run:
    def __init__(self, name):
        self.file = open(name, "rb")
        self.next()

    def next(self):
        self.line = self.file.readline()
        if self.line:
            record = json.loads(self.line)
            self.key = (record["file"], record.get("wheel", ""))
        else:
            self.file.close()
