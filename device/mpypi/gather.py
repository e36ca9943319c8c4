"""Everything is there: gathers the files of the release under way that need no unpacking."""

import gc
import os

from . import boot, limits
from .files import FILE, STAGING, installed, intact, is_digest, names
from .tape import TAPES, Tapes


async def run(agent):
    agent.phase = "verifying"
    await agent.try_report()
    gc.collect()
    if agent.line and gc.mem_free() < limits.ROOM:
        # To unpack needs more room than a connection leaves.
        await agent.line.leave(agent.topics[1] + "online")
        agent.hang_up()
    tapes, agent.packed = gather(agent.root, agent.entries)
    agent.tapes = tapes.pause()
    return "unpack"


def gather(root, entries):
    """Puts src files, and the files of wheels that the device has, on tape.

    -> (tapes, bitmap): bit n is set where entry n is a wheel to unpack
    """
    boot.tidy(root)
    for name in names(root + STAGING):
        if not is_digest(name):
            os.remove(root + STAGING + "/" + name)
    tapes = Tapes(root + TAPES)
    packed = bytearray()
    number = 0
    for entry in entries():
        if not number & 7:
            packed.append(0)
        if entry["type"] != "wheel":
            tapes.add(entry["path"], entry["pkg_sha256"])
        elif intact(root, entry):
            for line in installed(root):
                if "file" in line and line.get("wheel") == entry["name"]:
                    tapes.add(line["file"], line["digest"], entry["name"])
        else:
            packed[number >> 3] |= 1 << (number & 7)
        number += 1
    return tapes, packed
