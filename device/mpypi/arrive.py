"""Takes an update list in, checks that it is one, and writes down what of it is for this device."""

import binascii
import hashlib
import json
import os

from . import limits, lists
from .refusal import Refused


async def run(agent):
    line = agent.line
    kind, agent.arrived = agent.arrived, None
    if line.left > limits.LIST:
        text = "a list of %d bytes is larger than %d" % (line.left, limits.LIST)
        agent.arrived = (Refused("bad-list", text), None, None, kind)
        return "judge"
    arrival = _Arrival(agent.folder)
    try:
        while True:
            piece = await line.piece()
            if not piece:
                break
            arrival.write(piece)
        path = arrival.finish()
    finally:
        arrival.close()
    digest = binascii.hexlify(arrival.digest.digest()).decode()
    # To read it takes most of the memory that there is.
    arrival = piece = None
    # The same list as before was written down before.
    known = path.endswith("list.json") and agent.order != "check" and "list.jsonl" in os.listdir(agent.folder[:-1])
    agent.arrived = (read(agent.folder, path, known), path, digest, kind)
    return "judge"


def read(folder, path, known=False):
    """What the list at `path` says, as `lists.check` has it; or why it is refused. What of it is for this
    device is in `list.next` then, unless it is `known`.
    """
    try:
        summary = lists.check(path, _rank)
    except Refused as refused:
        return refused
    if summary["unfit"]:
        from . import tags

        summary["device"] = tags.best()
    summary["known"] = known
    if known:
        return summary
    with open(folder + "list.next", "wb") as file:
        number = 0
        ours = summary["ours"]
        for entry in lists.read(path):
            if ours[number >> 3] & 1 << (number & 7):
                file.write((json.dumps(entry) + "\n").encode())
            number += 1
        file.flush()
    return summary


def _rank(tag):
    if tag is None or tag == "py3-none-any":
        return 2
    from . import tags

    return tags.rank(tag)


class _Arrival:
    """A list that arrives. It is written only where it differs from the one that is there, to spare the
    flash."""

    def __init__(self, folder):
        self.folder = folder
        self.size = 0
        self.digest = hashlib.sha256()
        self.part = self.same = None
        try:
            self.same = open(folder + "list.json", "rb")
        except OSError:
            self._differ()

    def write(self, piece):
        self.digest.update(piece)
        if not self.part and self.same.read(len(piece)) != piece:
            self._differ()
        if self.part:
            self.part.write(piece)
        self.size += len(piece)

    def _differ(self):
        self.part = open(self.folder + "list.part", "wb")
        if self.same:
            self.same.seek(0)
            for at in range(0, self.size, limits.PIECE):
                self.part.write(self.same.read(min(limits.PIECE, self.size - at)))

    def finish(self):
        """All of it has come: where it is."""
        if not self.part and self.same.read(1):
            self._differ()
        self.close()
        return self.folder + ("list.part" if self.part else "list.json")

    def close(self):
        for file in (self.part, self.same):
            if file:
                file.close()
