"""Works out what must be fetched for the release under way."""

import os
import time

from . import limits
from .files import CHUNKED, EMPTY, FILE, STAGING, Filter, digest, free, is_digest, is_staged, kind, staged_name
from .records import intact, names
from .refusal import Refused


async def run(agent):
    job = agent.job
    digest = job.seen["list"]
    tried, tries = agent.tried
    agent.tried = (digest, tries + 1 if tried == digest else 1)
    agent.show("downloading", job.seen)
    agent.attempt = agent.tried[1]
    agent.total = agent.done
    job.stop()
    job.needs, total = survey(agent.root, agent.entries)
    agent.total += total
    job.stall_at = time.ticks_add(time.ticks_ms(), limits.FETCH_STALL)
    return "listen"


def survey(root, entries):
    """What must be fetched. `entries()` gives a fresh iterator over the wheels (one for each name) and src
    files of the accepted list, each time the same. Drops what is staged for others.

    -> (bitmap, total): bit n (`bitmap[n >> 3] & 1 << (n & 7)`) is set where entry n must be fetched; `total`
       is the sum of their sizes, where the list says them. The same bytes are asked for once.
    """
    bitmap = bytearray()
    total = number = there = 0
    wanted = Filter()
    for entry in entries():
        if not number & 7:
            bitmap.append(0)
        known = wanted.note(entry["pkg_sha256"])
        if _needs(root, entry) and not (known and _asked(entries, bitmap, number, entry["pkg_sha256"])):
            bitmap[number >> 3] |= 1 << (number & 7)
            total += entry.get("size") or 0
            if "chunks" in entry:
                part = root + staged_name(entry["pkg_sha256"]) + CHUNKED
                # Right or wrong, it takes no more room.
                there += min(os.stat(part)[6], entry["size"]) if kind(part) == FILE else 0
        number += 1
    for name in names(root + STAGING):
        stem = name[:64]
        if not is_digest(stem) or stem not in wanted or name[64:] not in ("", CHUNKED):
            os.remove(root + STAGING + "/" + name)
    room = free(root)
    if total - there > room:
        raise Refused("no-space", "%d bytes are needed, %d are free" % (total - there, room))
    return bitmap, total


def _needs(root, entry):
    if is_staged(root, entry["pkg_sha256"]):
        return False
    if entry["type"] == "wheel":
        return not intact(root, entry)
    return entry["pkg_sha256"] != EMPTY and not digest(root + "/" + entry["path"]) == entry["pkg_sha256"]


def _asked(entries, bitmap, end, wanted):
    # Whether an entry before `end` asks for the same bytes.
    found = False
    for number, entry in enumerate(entries()):
        if number >= end:
            break
        if entry["pkg_sha256"] == wanted and bitmap[number >> 3] & 1 << (number & 7):
            found = True
    return found
