"""A package on its way to staging: bound, hashed, and written in pieces."""

import hashlib
import os

from . import limits
from .files import FILE, free, hexlify, kind, staged_name, topic, write
from .refusal import Refused, of_flash


class Incoming:
    """A package on its way to staging. Every method raises `Refused`; what came is then thrown away."""

    def __init__(self, root, entry):
        self.root = root
        self.entry = entry
        self.hasher = hashlib.sha256()
        self.size = 0
        self.open()

    def open(self):
        """What is to come, and where it goes."""
        self.announced = self.entry.get("size")
        self.wanted = self.entry["pkg_sha256"]
        self.to = self.root + staged_name(self.wanted)
        self.part = self.to + ".part"
        self.file = open(self.part, "wb")

    def write(self, piece):
        """Takes the next bytes (`bytearray` or `memoryview`, any size; small is best)."""
        self.size += len(piece)
        announced = self.announced
        if announced is not None and self.size > announced:
            self.refuse("wrong-size", "has %d bytes, %d were announced" % (self.size, announced))
        if self.size > limits.PACKAGE:
            self.refuse("too-large", "is larger than %d bytes" % limits.PACKAGE)
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
        if self.announced not in (None, self.size):
            self.refuse("wrong-size", "has %d bytes, %d were announced" % (self.size, self.announced))
        found = hexlify(self.hasher.digest())
        if found != self.wanted:
            self.refuse("wrong-hash", "has digest %s" % found[:12])
        try:
            self.file.flush()
            self.file.close()
            self.keep()
        except OSError as error:
            self.abort()
            raise of_flash(error)

    def keep(self):
        """They are right, and on the flash."""
        os.rename(self.part, self.to)

    def abort(self):
        """Throws away what came."""
        try:
            self.file.close()
        finally:
            if kind(self.part) == FILE:
                os.remove(self.part)

    def refuse(self, word, text):
        """Throws away what came, and says why."""
        self.abort()
        raise Refused(word, "%s %s" % (self.name(), text))

    def name(self):
        """What is to come, for people."""
        return name(self.entry)


def name(entry):
    """A package, for people."""
    digest = entry["pkg_sha256"]
    return "package `%s`" % topic(entry)[len("mpypi/packages/") :].replace(digest, digest[:12])
