"""A package on its way to staging: bound, hashed, and written in pieces."""

import hashlib
import os

from . import limits
from .files import FILE, free, hexlify, kind, staged_name, topic, write
from .refusal import Refused, of_flash


class Incoming:
    """A package on its way to staging. Every method raises `Refused`; what came is then thrown away."""

    def __init__(self, root, entry):
        self.entry = entry
        self.root = root
        self.to = root + staged_name(entry["pkg_sha256"])
        self.part = self.to + ".part"
        self.hasher = hashlib.sha256()
        self.size = 0
        self.file = open(self.part, "wb")

    def write(self, piece):
        """Takes the next bytes (`bytearray` or `memoryview`, any size; small is best)."""
        self.size += len(piece)
        announced = self.entry.get("size")
        if announced is not None and self.size > announced:
            self._wrong_size(announced)
        if self.size > limits.PACKAGE:
            self.abort()
            text = "package `%s` is larger than %d bytes"
            raise Refused("too-large", text % (self._short(), limits.PACKAGE))
        self.hasher.update(piece)
        try:
            write(self.file, piece)
        except OSError as error:
            refusal = of_flash(error)
            if refusal.word == "no-space":
                text = "%d bytes are needed, %d are free"
                refusal = Refused("no-space", text % (announced or self.size, free(self.root)))
            self.abort()
            raise refusal

    def finish(self):
        """All bytes have come: verifies them."""
        announced = self.entry.get("size")
        if announced is not None and announced != self.size:
            self._wrong_size(announced)
        found = hexlify(self.hasher.digest())
        if found != self.entry["pkg_sha256"]:
            self.abort()
            raise Refused("wrong-hash", "package `%s` has digest %s" % (self._short(), found[:12]))
        try:
            self.file.flush()
            self.file.close()
            os.rename(self.part, self.to)
        except OSError as error:
            self.abort()
            raise of_flash(error)

    def abort(self):
        """Throws away what came."""
        try:
            self.file.close()
        finally:
            if kind(self.part) == FILE:
                os.remove(self.part)

    def _wrong_size(self, announced):
        self.abort()
        text = "package `%s` has %d bytes, %d were announced"
        raise Refused("wrong-size", text % (self._short(), self.size, announced))

    def _short(self):
        digest = self.entry["pkg_sha256"]
        return topic(self.entry)[len("mpypi/packages/") :].replace(digest, digest[:12])
