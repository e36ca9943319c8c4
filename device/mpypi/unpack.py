"""Unpacks the wheels of the release under way that the device does not have."""

import json
import os

from . import limits

# Keeps a place free for what unpacking needs in one piece, while modules take their many small ones.
_place = bytearray(limits.INFLATE)

from .files import FILE, GATHERED, digest, is_staged, kind, staged_name, topic, write
from .refusal import Refused, missing_package


async def run(agent):
    unpack(agent.root, agent.entries, agent.packed)
    agent.packed = None
    return "plan"


def unpack(root, entries, packed):
    """Unpacks into staging the entries whose bit is set in `packed`, and writes down their files."""
    number = 0
    with open(root + GATHERED, "ab") as out:
        for entry in entries():
            if packed[number >> 3] & 1 << (number & 7):
                _unpack(root, entry, out)
            number += 1
        out.flush()


def _unpack(root, entry, out):
    global _place
    from . import wheel

    if _place:
        wheel.place = _place
        _place = None

    def have(path, wanted):
        return is_staged(root, wanted) or digest(root + "/" + path) == wanted

    def add(path, found):
        line = {"file": path, "digest": found, "wheel": entry["name"]}
        write(out, json.dumps(line).encode() + b"\n")

    package = root + staged_name(entry["pkg_sha256"])
    if kind(package) != FILE:
        raise missing_package(topic(entry))
    try:
        wheel.unpack(root, entry, have, add)
    except Refused as refused:
        if refused.verdict == "reject" and digest(package) != entry["pkg_sha256"]:
            # It was right when it was received: not the wheel is bad, but the flash.
            os.remove(package)
            raise Refused("storage", "wheel `%s` changed in staging" % entry["name"])
        raise
