"""Says of each of many lists whether this device believes it: a line with the word of the refusal, or `believed`.

    micropython mutations.py ROOT LISTS SCRATCH

LISTS holds them one after the other, each behind its length in four bytes, most significant first. ROOT is whom the
device believes, on channel `dev`.
"""

import sys

from mpypi import judge, keys, lists, nested, rsa, vouch
from mpypi.refusal import Refused

root, mutations, scratch = sys.argv[1:]


class Board:
    """What of an agent is looked at to believe a list."""

    keys = True
    turn = None
    channel = "dev"
    roots = [1, None, 0, None, None]
    root = scratch
    folder = scratch + "/.mpypi/"


class Signers(keys.Signers):
    """Those of the root, which is looked at once."""

    once = {}

    def get(self, name):
        if name not in self.once:
            self.once[name] = super().get(name)
        return self.once[name]


signers = Signers(root, "dev")
keys.Signers = lambda path, channel: signers


def word(path):
    try:
        release = lists.check(path, lambda tag: 1)["release"]
        found = {"channel": "dev", "list": "0" * 64}
        if release:
            found["sequence"] = release["sequence"]
        time = vouch.check(Board, release, found, path)
        judge.check(Board, release, found, {}, "list", time)
        if release["more"]:
            nested.release(path)
        return "believed"
    except Refused as refused:
        return refused.word


with open(mutations, "rb") as file:
    while True:
        length = file.read(4)
        if not length:
            break
        with open(scratch + "/list", "wb") as out:
            out.write(file.read(int.from_bytes(length, "big")))
        print(word(scratch + "/list"))
