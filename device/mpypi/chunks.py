"""Packages that come in chunks.

Chunks are appended in their order, each only once it is the next one; while one comes, the one after it is asked for.
So a broker that answers what it is asked keeps the order by itself; what comes out of turn is passed over, and asked
for again. What is on the flash is believed only after it was read: before the first chunk is asked for, and once more,
as a whole, when the last one has come.

`job.chunks` is `(entry, number, place)`: the package, how many of its chunks are there, and where in the list the digest
of the next one is.
"""

import hashlib
import os

from . import limits
from .files import CHUNKED, FILE, hexlify, is_digest, kind, piece, staged_name
from .incoming import Incoming, name
from .refusal import Refused


async def look(agent, entry):
    """Looks how much of a package is there. If it is not all of it, it is the job's from now on."""
    job = agent.job
    before, job.chunks = job.chunks, (entry, 0, 0)
    for _ in count(agent.root, agent.folder + "list.json", job):
        await agent.nap(0)
    size, most, _ = entry["chunks"]
    number = job.chunks[1]
    if number == most:
        job.chunks = None
    elif before:
        raise Refused("storage", "%s changed in staging" % name(entry))
    if not before:
        agent.done += min(number * size, entry["size"])


def count(root, path, job):
    """Counts the chunks that are there, by the list in the file `path`; if that is all of them, and the package is what
    it should be, it is staged. Yields after every piece."""
    entry = job.chunks[0]
    size, _, place = entry["chunks"]
    left = entry["size"]
    if left > limits.PACKAGE:
        raise Refused("too-large", "%s is larger than %d bytes" % (name(entry), limits.PACKAGE))
    number = 0
    job.chunks = entry, number, place
    to = root + staged_name(entry["pkg_sha256"])
    part = to + CHUNKED
    if kind(part) != FILE:
        return
    if os.stat(part)[6] > left:
        os.remove(part)
        return
    whole = hashlib.sha256()
    with open(part, "rb") as file:
        while left:
            wanted, place = digest(path, place)
            hasher = hashlib.sha256()
            end = max(0, left - size)
            while left > end:
                view = piece[: min(left - end, limits.PIECE)]
                view = view[: file.readinto(view)]
                if not view:
                    return
                hasher.update(view)
                whole.update(view)
                left -= len(view)
                yield
            if hexlify(hasher.digest()) != wanted:
                return
            number += 1
            job.chunks = entry, number, place
    found = hexlify(whole.digest())
    if found != entry["pkg_sha256"]:
        # Each chunk is as the list says, and the package is not.
        os.remove(part)
        raise Refused("wrong-hash", "%s has digest %s" % (name(entry), found[:12]))
    os.rename(part, to)


def topic(job, more=0):
    """Where the next chunk is retained, or one after it."""
    entry, number, _ = job.chunks
    return "mpypi/chunks/%s/%d" % (entry["pkg_sha256"], number + more)


async def begin(agent, name):
    """A message with a chunk begins, on the topic `name`. -> `Chunk`; `None` if it is not the next one"""
    job = agent.job
    if name != topic(job):
        return None
    entry, number, _ = job.chunks
    following = topic(job, 1)
    if number + 1 < entry["chunks"][1] and following not in job.open:
        job.open[following] = entry
        await agent.ask([following])
    return Chunk(agent.root, agent.folder + "list.json", job)


class Chunk(Incoming):
    """The next chunk of a package, on its way to those before it."""

    def __init__(self, root, path, job):
        self.path = path
        self.job = job
        super().__init__(root, job.chunks[0])

    def open(self):
        entry, number, place = self.job.chunks
        size = entry["chunks"][0]
        at = number * size
        self.announced = min(size, entry["size"] - at)
        self.wanted, self.place = digest(self.path, place)
        # There may be bytes of it that came before.
        self.file = open(self.root + staged_name(entry["pkg_sha256"]) + CHUNKED, "r+b" if number else "wb")
        self.file.seek(at)

    def keep(self):
        self.job.chunks = self.entry, self.job.chunks[1] + 1, self.place

    def abort(self):
        # Its bytes may stay: nobody believes them.
        self.file.close()

    def name(self):
        return "chunk %d of %s" % (self.job.chunks[1], name(self.entry))


def digest(path, place):
    """The digest at `place` in the list in the file `path`, and where to look for the next one."""
    with open(path, "rb") as file:
        file.seek(place)
        # White space, and a comma before all but the first.
        for _ in range(limits.PIECE):
            if file.read(1) == b'"':
                break
        found = file.read(64).decode()
        if not is_digest(found):
            # It was right when it came.
            raise ValueError("`%s` is damaged" % path)
        return found, file.tell() + 1
