"""Unpacks the wheels of the release under way that the device does not have."""

import os

from . import limits
from .files import FILE, digest, is_staged, kind, staged_name, topic
from .refusal import Refused, missing_package
from .tape import TAPES, Tapes


async def run(agent):
    tapes = Tapes(agent.root + TAPES, agent.tapes)
    unpack(agent.root, agent.entries, tapes, agent.packed)
    agent.tapes = tapes.pause()
    agent.packed = None
    return "plan"


def unpack(root, entries, tapes, packed):
    """Unpacks into staging the entries whose bit is set in `packed`, and puts their files on tape."""
    number = 0
    for entry in entries():
        if packed[number >> 3] & 1 << (number & 7):
            _unpack(root, entry, tapes)
        number += 1


def _unpack(root, entry, tapes):
    # Keeps a place free for what unpacking needs in one piece, while the module takes its many small ones.
    place = bytearray(limits.INFLATE)
    from .wheel import unpack

    place = None
    def have(path, wanted):
        return is_staged(root, wanted) or digest(root + "/" + path) == wanted

    def add(path, found):
        tapes.add(path, found, entry["name"])

    package = root + staged_name(entry["pkg_sha256"])
    if kind(package) != FILE:
        raise missing_package(topic(entry))
    try:
        unpack(root, entry, have, add)
    except Refused as refused:
        if refused.verdict == "reject" and digest(package) != entry["pkg_sha256"]:
            # It was right when it was received: not the wheel is bad, but the flash.
            os.remove(package)
            raise Refused("storage", "wheel `%s` changed in staging" % entry["name"])
        raise
