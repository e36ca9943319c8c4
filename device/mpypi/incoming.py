"""A package on its way to staging: bound, hashed, and written in pieces."""

import hashlib
import os

from . import limits
from .files import FILE, free, hexlify, kind, staged_name, topic, write
from .refusal import Refused, of_flash


class Incoming:
    """A package on its way to staging. Every method raises `Refused`; what came is then thrown away."""

    def __init__(self, root, entry):
        self._entry = entry
        self._root = root
        self._to = root + staged_name(entry["pkg_sha256"])
        self._part = self._to + ".part"
        self._hasher = hashlib.sha256()
        self._size = 0
        self._file = open(self._part, "wb")

    def write(self, piece):
        """Takes the next bytes (`bytearray` or `memoryview`, any size; small is best)."""
        self._size += len(piece)
        announced = self._entry.get("size")
        if announced is not None and self._size > announced:
            self._wrong_size(announced)
        if self._size > limits.PACKAGE:
            self.abort()
            raise Refused("too-large", "package `%s` is larger than %d bytes" % (self._short(), limits.PACKAGE))
        self._hasher.update(piece)
        try:
            write(self._file, piece)
        except OSError as error:
            refusal = of_flash(error)
            if refusal.word == "no-space":
                text = "%d bytes are needed, %d are free"
                refusal = Refused("no-space", text % (announced or self._size, free(self._root)))
            self.abort()
            raise refusal

    def finish(self):
        """All bytes have come: verifies them."""
        announced = self._entry.get("size")
        if announced is not None and announced != self._size:
            self._wrong_size(announced)
        found = hexlify(self._hasher.digest())
        if found != self._entry["pkg_sha256"]:
            self.abort()
            raise Refused("wrong-hash", "package `%s` has digest %s" % (self._short(), found[:12]))
        try:
            self._file.flush()
            self._file.close()
            os.rename(self._part, self._to)
        except OSError as error:
            self.abort()
            raise of_flash(error)

    def abort(self):
        """Throws away what came."""
        try:
            self._file.close()
        finally:
            if kind(self._part) == FILE:
                os.remove(self._part)

    def _wrong_size(self, announced):
        self.abort()
        text = "package `%s` has %d bytes, %d were announced"
        raise Refused("wrong-size", text % (self._short(), self._size, announced))

    def _short(self):
        digest = self._entry["pkg_sha256"]
        return topic(self._entry)[len("mpypi/packages/") :].replace(digest, digest[:12])
