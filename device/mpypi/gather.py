"""Everything is there: gathers the files of the release under way that need no unpacking."""

import gc
import json
import os

from . import boot, limits
from .files import GATHERED, STAGING, is_digest, write
from .records import installed, intact, names


async def run(agent):
    agent.phase = "verifying"
    await agent.try_report()
    gc.collect()
    if agent.line and gc.mem_free() < limits.ROOM:
        # To unpack needs more room than a connection leaves.
        await agent.line.leave(agent.topics[1] + "online")
        agent.hang_up()
    agent.packed = gather(agent.root, agent.entries)
    return "unpack"


def gather(root, entries):
    """Writes down src files, and the files of wheels that the device has.

    -> a bitmap: bit n is set where entry n is a wheel to unpack
    """
    boot.tidy(root)
    for name in names(root + STAGING):
        if not is_digest(name):
            os.remove(root + STAGING + "/" + name)
    packed = bytearray()
    number = 0
    with open(root + GATHERED, "wb") as out:
        for entry in entries():
            if not number & 7:
                packed.append(0)
            if entry["type"] != "wheel":
                line = {"file": entry["path"], "digest": entry["pkg_sha256"]}
                write(out, json.dumps(line).encode() + b"\n")
            elif intact(root, entry):
                for line in installed(root):
                    if "file" in line and line.get("wheel") == entry["name"]:
                        write(out, json.dumps(line).encode() + b"\n")
            else:
                packed[number >> 3] |= 1 << (number & 7)
            number += 1
        out.flush()
    return packed
