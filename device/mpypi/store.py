"""What a device keeps, such that a power cut at any operation leaves the old or the new release.

The format and the steps are those of agent-sim/src/store.rs, whose table is the normative text. Lists,
records and wheels are read and written line by line and piece by piece. A start, and what follows a commit,
are in boot.py.

Each step is a module of its own (survey, incoming, gather, unpack, plan, commit), of which no two need to be
in memory together: where memory is short, the agent goes through them without a `Store`.

Entries are the dicts of an update list as they stand in it: `type`, `name`, `version`, `path`, `pkg_sha256`,
`size`. Everything may raise `Refused`.
"""

import os

from . import boot
from .boot import FILE, INSTALLED, JOURNAL, NONE, STAGING, header, kind, lines
from .refusal import Refused, of_flash


def _flash(method):
    # What the file system cannot do is a refusal.
    def call(*args):
        try:
            return method(*args)
        except OSError as error:
            raise of_flash(error)
        except ValueError as error:
            # A record is damaged.
            raise Refused("storage", str(error))

    return call


class Store:
    """A device's flash, below `root` ("" is where MicroPython has its files)."""

    def __init__(self, root=""):
        self.root = boot.place(root)
        # What is installed: `channel`, `sequence`, `version`, `list`, where known.
        self.head = {}
        # The newest list accepted: `channel`, `sequence`, `version`, `list`; and `refused`, with `error` and
        # `rolled_back`.
        self.seen = None
        # Where the agent streams a list to, and where it stands when complete. Meaningless after a restart.
        self.list_path = self.root + boot.FOLDER + "list.json"
        self.list_part = self.root + boot.FOLDER + "list.part"

    @_flash
    def boot(self):
        """Finishes or takes back what a journal says, and counts a start, unless `boot.run` did in this
        start.

        -> ("rest", seen or None): the installed release runs. `seen["refused"]["rolled_back"]` says whether
           the newest list was taken back.
        -> ("confirming", seen): a new release runs, and waits for `confirm` or `give_up`.
        -> ("restart", seen): files were put in place or taken back under what runs now: restart the device.
        """
        found = boot.found(self.root)
        self.load()
        if found[0] == "rest":
            self._check_staging()
        return found

    @_flash
    def load(self):
        """Reads `head` and `seen`."""
        self.head = header(self.root + INSTALLED)
        self.seen = boot.read(self.root + boot.SEEN)

    def _check_staging(self):
        # Keeps what is complete and right, so that downloads go on after a restart.
        from .files import CHUNKED, digest, is_digest
        from .records import names

        for name in names(self.root + STAGING):
            path = self.root + STAGING + "/" + name
            if name[64:] == CHUNKED and is_digest(name[:64]):
                # Nothing of it is believed before `chunks` has looked at it.
                continue
            if not is_digest(name) or digest(path) != name:
                os.remove(path)

    @_flash
    def remember(self, seen):
        """Notes that a list was accepted: nothing older is believed from now on."""
        if seen != self.seen:
            boot.write_seen(self.root, seen)
            self.seen = seen

    def refuse(self, error):
        """Notes that the list last accepted is not to be tried again (`error`: text), drops what was
        fetched."""
        if self.seen:
            seen = dict(self.seen)
            seen["refused"] = {"error": error, "rolled_back": False}
            self.remember(seen)
        self.discard()

    def forgive(self):
        """Forgets that the list last accepted was refused."""
        if self.seen and "refused" in self.seen:
            seen = dict(self.seen)
            del seen["refused"]
            self.remember(seen)

    @_flash
    def discard(self):
        """Drops what was fetched."""
        if kind(self.root + JOURNAL) == NONE:
            boot.tidy(self.root)
        boot.clear(self.root + STAGING)

    @_flash
    def survey(self, entries):
        """What must be fetched. `entries()` gives a fresh iterator over the wheels (one for each name) and
        src files of the accepted list, each time the same. Drops what is staged for others.

        -> (bitmap, total): bit n (`bitmap[n >> 3] & 1 << (n & 7)`) is set where entry n must be fetched;
           `total` is the sum of their sizes, where the list says them. The same bytes are asked for once.
        """
        from .survey import survey

        return survey(self.root, entries)

    @_flash
    def receive(self, entry):
        """Takes the package of `entry` in, piece by piece. -> Incoming"""
        from .incoming import Incoming

        return Incoming(self.root, entry)

    @_flash
    def stage(self, seen, entries):
        """Unpacks what was fetched and works out what has to change. -> whether files change"""
        from .gather import gather
        from .plan import plan
        from .unpack import unpack

        unpack(self.root, entries, gather(self.root, entries))
        self._changes = plan(self.root, seen, entries)
        self._seen = seen
        return self._changes > 0

    @_flash
    def commit(self):
        """Puts what `stage` prepared in place. -> "unchanged", or "restart": restart the device"""
        from .commit import commit

        done = commit(self.root, self._seen, self._changes)
        self.load()
        return done

    @_flash
    def confirm(self):
        """The new release is what is installed from now on."""
        if not boot.confirm(self.root):
            raise Refused("bug", "there is no release to confirm")
        self.load()

    @_flash
    def give_up(self, reason):
        """The new release is taken back by the next start. `reason` is a text. -> whether it will: not if what was
        before is revoked
        """
        journal = boot.read(self.root + JOURNAL)
        if not journal:
            raise Refused("bug", "there is no release to take back")
        if journal.get("keep"):
            return False
        journal["step"] = "rollback"
        journal["reason"] = reason
        boot.write_journal(self.root, journal)
        return True

    def versions(self):
        """Iterates over (name, version) of the wheels installed."""
        if kind(self.root + INSTALLED) == FILE:
            for line in lines(self.root + INSTALLED):
                if "version" in line:
                    yield line["wheel"], line["version"]

    @_flash
    def free(self):
        """Free space in bytes."""
        from .files import free

        return free(self.root)
