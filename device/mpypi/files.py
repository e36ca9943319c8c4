"""Names, digests and pieces of files."""

import binascii
import hashlib
import os

from . import limits
from .boot import FILE, kind

# The SHA-256 of nothing.
EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
# The folder that belongs to the agent.
_RESERVED = ".mpypi"

# Shared by all that reads and writes files: allocated once, so that a heap in pieces cannot stop an update.
_buffer = bytearray(limits.PIECE)
piece = memoryview(_buffer)


def check_path(path):
    """Raises `ValueError` unless `path` names a file inside the device's root: the rules and texts of
    protocol/src/path.rs."""
    if not path:
        raise ValueError("a path must not be empty")
    length = len(path.encode())
    if length > limits.PATH:
        raise ValueError("a path of %d bytes is longer than %d" % (length, limits.PATH))
    components = path.count("/") + 1
    if components > limits.PATH_COMPONENTS:
        raise ValueError("a path of %d components has more than %d" % (components, limits.PATH_COMPONENTS))
    for character in path:
        code = ord(character)
        if code < 0x20 or 0x7F <= code < 0xA0 or character in "\\:":
            raise ValueError(
                "path `%s` has the character %r, which not every device can store" % (path, character)
            )
    names = path.split("/")
    for name in names:
        if name in ("", ".", ".."):
            raise ValueError(
                "path `%s` would leave the device's root: component `%s` is not a name" % (path, name)
            )
    for name in names:
        if name[-1] in ". ":
            raise ValueError(
                "path `%s`: component `%s` ends in a dot or space, which not every device keeps" % (path, name)
            )
    # FAT, which many boards use, ignores case.
    if names[0].lower() == _RESERVED:
        raise ValueError("path `%s` is inside `%s`, which belongs to the agent" % (path, _RESERVED))


def parents(path):
    """The folders the file lies in, outermost first: `a`, `a/b` for `a/b/c.py`."""
    end = path.find("/")
    while end > 0:
        yield path[:end]
        end = path.find("/", end + 1)


def hexlify(data):
    """Bytes as hexadecimal digits."""
    return binascii.hexlify(data).decode()


def is_digest(name):
    """Whether a text is a SHA-256 in lower case."""
    return len(name) == 64 and all(c in "0123456789abcdef" for c in name)


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


def copy(source, target):
    """Copies a file; `target` is durable before it has its name."""
    beside = target + ".part"
    with open(source, "rb") as file, open(beside, "wb") as out:
        while True:
            length = file.readinto(_buffer)
            if not length:
                break
            write(out, piece[:length])
        out.flush()
    os.rename(beside, target)


def write(file, data):
    """Writes all of `data`. Where a file system is full, some ports write a part and say so."""
    if file.write(data) != len(data):
        raise OSError(28)


class Filter:
    """Notes digests in bounded memory: says of a noted one that it may be noted, and of nearly all others that
    they are not."""

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
