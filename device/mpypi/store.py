"""What a device keeps, such that a power cut at any operation leaves the old or the new release.

The format and the steps are those of agent-sim/src/store.rs, whose table is the normative text. Lists, records and
wheels are read and written line by line and piece by piece.

Entries are the dicts of an update list as they stand in it: `type`, `name`, `version`, `path`, `pkg_sha256`, `size`.
"""


class Store:
    """A device's flash, below `root` ("" is where MicroPython has its files)."""

    def __init__(self, root=""):
        self.root = root
        # What is installed: `channel`, `sequence`, `version`, `list`, where known.
        self.head = {}
        # The newest list accepted: `channel`, `sequence`, `version`, `list`; `refused`: {"error", "rolled_back"}.
        self.seen = None

    def boot(self):
        """Finishes or takes back what a journal says. Counts a start: once each, see `boot.run`.

        -> ("rest", seen or None): the installed release runs. `seen["refused"]["rolled_back"]` says whether the newest
           list was taken back.
        -> ("confirming", seen): a new release runs, and waits for `confirm` or `give_up`.
        -> ("restart", seen): files were put in place or taken back under what runs now: restart the device.
        """
        raise NotImplementedError

    def remember(self, seen):
        """Notes that a list was accepted: nothing older is believed from now on."""

    def refuse(self, error):
        """Notes that the list last accepted is not to be tried again (`error`: text), drops what was fetched."""

    def forgive(self):
        """Forgets that the list last accepted was refused."""

    def discard(self):
        """Drops what was fetched."""

    def survey(self, entries):
        """What must be fetched. `entries()` gives a fresh iterator over the wheels (one for each name) and src files of
        the accepted list, each time the same.

        -> (bitmap, total): bit n (`bitmap[n >> 3] & 1 << (n & 7)`) is set where entry n must be fetched; `total` is the
           sum of their sizes, where the list says them. The same bytes are asked for once.
        """

    def receive(self, entry):
        """Takes the package of `entry` in, piece by piece. -> Incoming"""

    def stage(self, seen, entries):
        """Unpacks what was fetched and works out what has to change. -> whether files change"""

    def commit(self):
        """Puts what `stage` prepared in place. -> "unchanged", or "restart": restart the device"""

    def confirm(self):
        """The new release is what is installed from now on."""

    def give_up(self, reason):
        """The new release is taken back by the next start. `reason` is a text."""

    def versions(self):
        """Iterates over (name, version) of the wheels installed."""

    def free(self):
        """Free space in bytes."""

    # Where the agent streams a list to, and where it stands when complete. Meaningless after a restart.
    @property
    def list_part(self):
        return self.root + "/.mpypi/list.part"

    @property
    def list_path(self):
        return self.root + "/.mpypi/list.json"


class Incoming:
    """A package on its way to staging. Every method raises `Refused`; what came is then thrown away."""

    def write(self, piece):
        """Takes the next bytes (`bytearray` or `memoryview`, any size; small is best)."""

    def finish(self):
        """All bytes have come: verifies them."""

    def abort(self):
        """Throws away what came."""
