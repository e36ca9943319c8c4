"""Says of each of many lists whether this device believes it: a line with the word of the refusal, or `believed`.

    micropython mutations.py LISTS SCRATCH

The first line of LISTS is an object with the `root` that the device believes and its `channel`; each other one an
object with a list, in hexadecimal digits, as `hex`.
"""

import binascii
import json
import sys

from mpypi import judge, keys, lists, nested, rsa, vouch
from mpypi.refusal import Refused

mutations, scratch = sys.argv[1:]
mutations = open(mutations)
first = json.loads(mutations.readline())
with open(scratch + "/root", "wb") as file:
    file.write(first["root"].encode())


class Board:
    """What of an agent is looked at to believe a list."""

    keys = True
    turn = None
    channel = first["channel"]
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


signers = Signers(scratch + "/root", Board.channel)
keys.Signers = lambda path, channel: signers


def word(path):
    try:
        release = lists.check(path, lambda tag: 1)["release"]
        found = {"channel": Board.channel, "list": "0" * 64}
        if release:
            found["sequence"] = release["sequence"]
        time = vouch.check(Board, release, found, path)
        judge.check(Board, release, found, {}, "list", time)
        if release["more"]:
            nested.release(path)
        return "believed"
    except Refused as refused:
        return refused.word


for line in mutations:
    with open(scratch + "/list", "wb") as file:
        file.write(binascii.unhexlify(json.loads(line)["hex"]))
    print(word(scratch + "/list"))
