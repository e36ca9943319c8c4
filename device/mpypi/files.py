"""Names, digests and pieces of files."""

import binascii
import hashlib
import os
import sys

from micropython import const

from . import limits

# The SHA-256 of nothing.
EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
# As in boot.py, which imports nothing of ours, and which most of what is here must do without.
STAGING = "/.mpypi/staging"
INSTALLED = "/.mpypi/installed.jsonl"
# What the name of the first chunks of a package ends in, behind its digest.
CHUNKED = ".chunks"
# The files of the release under way, one to a line, as they come.
GATHERED = STAGING + "/files.part"
NONE = const(0)
FILE = const(1)
DIRECTORY = const(2)
_ENOENT = const(2)
_ENOTDIR = const(20)

# Shared by all that reads and writes files: allocated once, so that a heap in pieces cannot stop an update.
# The agent's has nothing to do with files while files have to do with it.
_agent = sys.modules.get("mpypi.agent")
_buffer = _agent.buffer if _agent else bytearray(limits.PIECE)
piece = memoryview(_buffer)


def kind(path):
    """What stands at `path`: NONE, FILE (and all that is no folder) or DIRECTORY."""
    try:
        return DIRECTORY if os.stat(path)[0] & 0x4000 else FILE
    except OSError as error:
        if error.args[0] in (_ENOENT, _ENOTDIR):
            return NONE
        raise


def staged_name(digest, copy=0):
    """Where a staged file is, below the root."""
    return STAGING + "/" + digest + ("-%d" % copy if copy else "")


def is_staged(root, digest):
    """Whether a file with these bytes is in staging."""
    return kind(root + staged_name(digest)) == FILE


def free(root):
    """Free space in bytes."""
    found = os.statvfs(root or "/")
    return found[1] * found[4]


def topic(entry):
    """Where the package of a wheel or src entry is retained."""
    if entry["type"] == "wheel":
        return "mpypi/packages/wheel/" + entry["pkg_sha256"]
    return "mpypi/packages/src/%s/%s" % (entry["path"], entry["pkg_sha256"])


def hexlify(data):
    """Bytes as hexadecimal digits."""
    return binascii.hexlify(data).decode()


def is_digest(name):
    """Whether a text is a SHA-256 in lower case."""
    data = name.encode()
    return len(data) == 64 and not data.strip(b"0123456789abcdef")


def digest(path):
    """The SHA-256 of the file at `path`; None if there is none."""
    if kind(path) != FILE:
        return None
    hasher = hashlib.sha256()
    with open(path, "rb") as file:
        while True:
            length = file.readinto(_buffer)
            if not length:
                return hexlify(hasher.digest())
            hasher.update(piece[:length])


def write(file, data):
    """Writes all of `data`. Where a file system is full, some ports write a part and say so."""
    if file.write(data) != len(data):
        raise OSError(28)


def sync():
    """Makes names durable, where the port can."""
    if hasattr(os, "sync"):
        os.sync()


class Filter:
    """Notes digests in bounded memory: says of a noted one that it may be noted, and of nearly all others
    that they are not."""

    def __init__(self):
        self._bits = bytearray(512)

    def note(self, digest):
        """Notes a digest. -> whether it may have been noted before"""
        known = True
        for start in (0, 4):
            bit = int(digest[start : start + 4], 16) & 4095
            if not self._bits[bit >> 3] & 1 << (bit & 7):
                self._bits[bit >> 3] |= 1 << (bit & 7)
                known = False
        return known

    def __contains__(self, digest):
        for start in (0, 4):
            bit = int(digest[start : start + 4], 16) & 4095
            if not self._bits[bit >> 3] & 1 << (bit & 7):
                return False
        return True
