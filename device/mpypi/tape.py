"""Sorts the files of a release by their paths, in bounded memory: two tapes are merged into two others, until one
holds all."""

import json
import os

from .files import FILE, kind


class Tapes:
    """Lines as in `installed.jsonl`, sorted by path, then by wheel. Its four files begin with `prefix`."""

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
