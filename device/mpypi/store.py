"""What a device keeps, such that a power cut at any operation leaves the old or the new release.

The format and the steps are those of agent-sim/src/store.rs, whose table is the normative text. Lists, records
and wheels are read and written line by line and piece by piece. A start, and what follows a commit, are in boot.py.

Entries are the dicts of an update list as they stand in it: `type`, `name`, `version`, `path`, `pkg_sha256`,
`size`. Everything may raise `Refused`.
"""

import hashlib
import json
import os

from . import boot, limits
from .boot import DIRECTORY, FILE, INSTALLED, JOURNAL, NEXT, NONE, OLD, PLAN, RESERVE, STAGING, kind
from .boot import header, lines, staged_name
from .files import EMPTY, Filter, copy, digest, hexlify, is_digest, parents, write
from .refusal import Refused, of_flash

# The agent's own folder. It stays where a release does not bring it: without it no other release would come.
AGENT = "lib/mpypi/"


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
        # The newest list accepted: `channel`, `sequence`, `version`, `list`; `refused`: {"error", "rolled_back"}.
        self.seen = None
        # Where the agent streams a list to, and where it stands when complete. Meaningless after a restart.
        self.list_path = self.root + boot.FOLDER + "list.json"
        self.list_part = self.root + boot.FOLDER + "list.part"

    @_flash
    def boot(self):
        """Finishes or takes back what a journal says, and counts a start, unless `boot.run` did in this start.

        -> ("rest", seen or None): the installed release runs. `seen["refused"]["rolled_back"]` says whether the
           newest list was taken back.
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
        for name in _names(self.root + STAGING):
            path = self.root + STAGING + "/" + name
            if not is_digest(name) or digest(path) != name:
                os.remove(path)

    @_flash
    def remember(self, seen):
        """Notes that a list was accepted: nothing older is believed from now on."""
        if seen != self.seen:
            boot.write_seen(self.root, seen)
            self.seen = seen

    def refuse(self, error):
        """Notes that the list last accepted is not to be tried again (`error`: text), drops what was fetched."""
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
        """What must be fetched. `entries()` gives a fresh iterator over the wheels (one for each name) and src
        files of the accepted list, each time the same. Drops what is staged for others.

        -> (bitmap, total): bit n (`bitmap[n >> 3] & 1 << (n & 7)`) is set where entry n must be fetched; `total`
           is the sum of their sizes, where the list says them. The same bytes are asked for once.
        """
        bitmap = bytearray()
        total = number = 0
        wanted = Filter()
        for entry in entries():
            if not number & 7:
                bitmap.append(0)
            known = wanted.note(entry["pkg_sha256"])
            if self._needs(entry) and not (known and self._asked(entries, bitmap, number, entry["pkg_sha256"])):
                bitmap[number >> 3] |= 1 << (number & 7)
                total += entry.get("size") or 0
            number += 1
        for name in _names(self.root + STAGING):
            if not is_digest(name) or name not in wanted:
                os.remove(self.root + STAGING + "/" + name)
        free = self.free()
        if total > free:
            raise Refused("no-space", "%d bytes are needed, %d are free" % (total, free))
        return bitmap, total

    def _needs(self, entry):
        if self._is_staged(entry["pkg_sha256"]):
            return False
        if entry["type"] == "wheel":
            return not self._intact(entry)
        return entry["pkg_sha256"] != EMPTY and not self._has(entry["path"], entry["pkg_sha256"])

    def _asked(self, entries, bitmap, end, wanted):
        # Whether an entry before `end` asks for the same bytes.
        found = False
        for number, entry in enumerate(entries()):
            if number >= end:
                break
            if entry["pkg_sha256"] == wanted and bitmap[number >> 3] & 1 << (number & 7):
                found = True
        return found

    @_flash
    def receive(self, entry):
        """Takes the package of `entry` in, piece by piece. -> Incoming"""
        return Incoming(self, entry)

    @_flash
    def stage(self, seen, entries):
        """Unpacks what was fetched and works out what has to change. -> whether files change"""
        if kind(self.root + JOURNAL) != NONE:
            raise Refused("bug", "a release is staged while another is being confirmed")
        boot.tidy(self.root)
        for name in _names(self.root + STAGING):
            if not is_digest(name):
                os.remove(self.root + STAGING + "/" + name)
        from .tape import Tapes

        tapes = Tapes(self.root + STAGING + "/files-")
        try:
            self._add_files(tapes, entries)
            files = tapes.sort()
            keeps_agent = self._plan_folders(files)
            with open(self.root + PLAN, "ab") as plan:
                puts = self._plan_puts(files, plan)
                removes = self._plan_removes(files, plan, keeps_agent)
                plan.flush()
            self._write_next(seen, entries, files)
        finally:
            tapes.remove()
        self._seen = seen
        self._changes = puts + removes
        return self._changes > 0

    def _add_files(self, tapes, entries):
        for entry in entries():
            if entry["type"] != "wheel":
                tapes.add(entry["path"], entry["pkg_sha256"])
            elif self._intact(entry):
                for line in self._files():
                    if line.get("wheel") == entry["name"]:
                        tapes.add(line["file"], line["digest"], entry["name"])
            else:
                self._unpack(tapes, entry)

    def _unpack(self, tapes, entry):
        from .wheel import unpack

        def have(path, digest):
            return self._is_staged(digest) or self._has(path, digest)

        def add(path, digest):
            tapes.add(path, digest, entry["name"])

        package = self.root + staged_name(entry["pkg_sha256"], 0)
        if kind(package) != FILE:
            raise Refused("missing-package", "the broker has no `%s`" % topic(entry))
        try:
            unpack(self.root, entry, have, add)
        except Refused as refusal:
            if refusal.verdict == "reject" and digest(package) != entry["pkg_sha256"]:
                # It was right when it was received: not the wheel is bad, but the flash.
                os.remove(package)
                raise Refused("storage", "wheel `%s` changed in staging" % entry["name"])
            raise

    def _plan_folders(self, files):
        # Writes the folders that are to be made, and refuses files that want one place. -> whether the agent
        # stays, because the release does not bring it
        root = self.root
        keeps_agent = True
        last = ""
        last_digest = last_wheel = None
        above = []  # files that the path may be below
        with open(root + PLAN, "wb") as plan:
            write(plan, b'{"format":%d}\n' % boot.FORMAT)
            for line in _records(files):
                path = line["file"]
                if path == last:
                    if line["digest"] != last_digest:
                        text = "two packages of this release bring `%s`, with different content"
                        raise Refused("conflict", text % path)
                    continue
                if path.startswith(AGENT):
                    keeps_agent = False
                while above and not path.startswith(above[-1]):
                    above.pop()
                for folder in above:
                    if path[len(folder)] == "/":
                        text = "`%s` is a file, and `%s` needs it as a folder"
                        raise Refused("conflict", text % (folder, path))
                above.append(path)
                for folder in parents(path):
                    if last.startswith(folder + "/"):
                        continue
                    found = kind(root + "/" + folder)
                    if found == FILE:
                        text = "`%s` is a file on this device, and `%s` needs it as a folder"
                        raise Refused("conflict", text % (folder, path))
                    if found == NONE:
                        write(plan, b'{"folder":%s}\n' % json.dumps(folder).encode())
                last, last_digest = path, line["digest"]
            plan.flush()
        return keeps_agent

    def _plan_puts(self, files, plan):
        # Each put finds its own file in staging: a digest that was perhaps used already gets another copy.
        used = Filter()
        puts = 0
        last = None
        for line in _records(files):
            path, wanted = line["file"], line["digest"]
            if path == last:
                continue
            last = path
            found = kind(self.root + "/" + path)
            if found == DIRECTORY:
                raise Refused("conflict", "`%s` is a folder on this device" % path)
            if self._has(path, wanted):
                continue
            first = self.root + staged_name(wanted, 0)
            if kind(first) != FILE:
                if wanted != EMPTY:
                    missing = topic({"type": "src", "path": path, "pkg_sha256": wanted})
                    raise Refused("missing-package", "the broker has no `%s`" % missing)
                with open(first, "wb"):
                    pass
            number = 0
            if used.note(wanted):
                while number == 0 or kind(self.root + staged_name(wanted, number)) == FILE:
                    number += 1
                copy(first, self.root + staged_name(wanted, number))
            text = '{"put":%s,"digest":"%s","copy":%d,"had":%s}\n'
            had = "false" if found == NONE else "true"
            write(plan, (text % (json.dumps(path), wanted, number, had)).encode())
            puts += 1
        return puts

    def _plan_removes(self, files, plan, keeps_agent):
        # What is installed and not in the release. Both are sorted.
        removes = 0
        last = None
        release = _records(files)
        line = next(release, None)
        for installed in self._files():
            path = installed["file"]
            while line and line["file"] < path:
                line = next(release, None)
            if path == last or line and line["file"] == path or keeps_agent and path.startswith(AGENT):
                continue
            last = path
            if kind(self.root + "/" + path) == FILE:
                write(plan, b'{"remove":%s}\n' % json.dumps(path).encode())
                removes += 1
        while line:
            line = next(release, None)
        return removes

    def _write_next(self, seen, entries, files):
        # What `installed.jsonl` will be.
        head = {key: seen[key] for key in seen if key != "refused"}
        with open(self.root + NEXT, "wb") as out:
            write(out, ('{"format":%d,%s}\n' % (boot.FORMAT, boot.list_text(head))).encode())
            for entry in entries():
                if entry["type"] == "wheel":
                    text = '{"wheel":%s,"version":%s,"digest":"%s"}\n'
                    text %= (json.dumps(entry["name"]), json.dumps(entry["version"]), entry["pkg_sha256"])
                    write(out, text.encode())
            with open(files, "rb") as file:
                while True:
                    line = file.readline(limits.LINE)
                    if not line:
                        break
                    write(out, line)
            release = _records(files)
            line = next(release, None)
            for folder in _both(boot.folders(self.root + INSTALLED), boot.folders(self.root + PLAN)):
                # Ours, and still needed.
                while line and line["file"] < folder + "/":
                    line = next(release, None)
                if line and line["file"].startswith(folder + "/"):
                    write(out, b'{"folder":%s}\n' % json.dumps(folder).encode())
            while line:
                line = next(release, None)
            out.flush()

    @_flash
    def commit(self):
        """Puts what `stage` prepared in place. -> "unchanged", or "restart": restart the device"""
        root = self.root
        if kind(root + JOURNAL) != NONE:
            raise Refused("bug", "a release is committed while another is being confirmed")
        if not self._changes:
            boot.finish(root, self._seen)
            self.load()
            return "unchanged"
        journal = {"step": "install", "boots": 0, "seen": self._seen}
        try:
            boot.clear(root + OLD)
            self._keep_copies()
            filling = b"-" * 256
            with open(root + RESERVE, "wb") as file:
                for _ in range(limits.RESERVE // len(filling)):
                    write(file, filling)
                file.flush()
            boot.sync()
            boot.write_journal(root, journal)
        except OSError:
            if kind(root + JOURNAL) == NONE:
                # They take up room that may be what is missing.
                boot.tidy(root)
            raise
        boot.redo(root)
        journal["step"] = "confirm"
        boot.write_journal(root, journal)
        return "restart"

    def _keep_copies(self):
        # Before the commit, a copy is kept of the old files whose folders a start needs. They are then replaced by
        # one rename, and a power cut does not leave a device without its boot.py, or without the module that goes
        # on with the journal. Nor is anything moved out of their folders: littlefs, cut in the middle of that,
        # hides the neighbour of what was moved.
        number = 0
        for line in lines(self.root + PLAN):
            if "folder" in line:
                continue
            name = line["put"] if "put" in line else line["remove"]
            if needed_to_start(name) and kind(self.root + "/" + name) == FILE:
                copy(self.root + "/" + name, self.root + OLD + "/%d" % number)
            number += 1

    @_flash
    def confirm(self):
        """The new release is what is installed from now on."""
        if not boot.confirm(self.root):
            raise Refused("bug", "there is no release to confirm")
        self.load()

    @_flash
    def give_up(self, reason):
        """The new release is taken back by the next start. `reason` is a text."""
        journal = boot.read(self.root + JOURNAL)
        if not journal:
            raise Refused("bug", "there is no release to take back")
        journal["step"] = "rollback"
        journal["reason"] = reason
        boot.write_journal(self.root, journal)

    def versions(self):
        """Iterates over (name, version) of the wheels installed."""
        if kind(self.root + INSTALLED) == FILE:
            for line in lines(self.root + INSTALLED):
                if "version" in line:
                    yield line["wheel"], line["version"]

    @_flash
    def free(self):
        """Free space in bytes."""
        found = os.statvfs(self.root or "/")
        return found[1] * found[4]

    def _files(self):
        # The lines of what is installed that name a file.
        if kind(self.root + INSTALLED) == FILE:
            for line in lines(self.root + INSTALLED):
                if "file" in line:
                    yield line

    def _is_staged(self, digest):
        return kind(self.root + staged_name(digest, 0)) == FILE

    def _has(self, path, wanted):
        return digest(self.root + "/" + path) == wanted

    def _intact(self, entry):
        # Whether the device has all files of the wheel, unchanged.
        if kind(self.root + INSTALLED) != FILE:
            return False
        known = False
        intact = True
        for line in lines(self.root + INSTALLED):
            if line.get("wheel") != entry["name"]:
                continue
            if "version" in line:
                known = line["digest"] == entry["pkg_sha256"]
            elif known and intact:
                intact = self._has(line["file"], line["digest"])
        return known and intact


class Incoming:
    """A package on its way to staging. Every method raises `Refused`; what came is then thrown away."""

    def __init__(self, store, entry):
        self._entry = entry
        self._to = store.root + staged_name(entry["pkg_sha256"], 0)
        self._part = self._to + ".part"
        self._hasher = hashlib.sha256()
        self._size = 0
        self._free = store.free
        self._file = open(self._part, "wb")

    @_flash
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
                refusal = Refused("no-space", text % (announced or self._size, self._free()))
            self.abort()
            raise refusal

    @_flash
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
        except OSError:
            self.abort()
            raise

    @_flash
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


def needed_to_start(path):
    """Whether a file is code, or lies beside what a start needs: boot.py, lib/, lib/mpypi/."""
    folder = path.rpartition("/")[0]
    return path.endswith((".py", ".mpy")) or folder in ("", "lib", "lib/mpypi")


def topic(entry):
    """Where the package of a wheel or src entry is retained."""
    if entry["type"] == "wheel":
        return "mpypi/packages/wheel/" + entry["pkg_sha256"]
    return "mpypi/packages/src/%s/%s" % (entry["path"], entry["pkg_sha256"])


def _names(path):
    # The names in a folder of ours, a few at a time: what is removed meanwhile must not confuse the file system.
    last = ""
    while True:
        names = []
        for entry in os.ilistdir(path):
            if entry[0] > last:
                names.append(entry[0])
                if len(names) > 16:
                    names.sort()
                    names.pop()
        names.sort()
        for name in names:
            yield name
        if len(names) < 16:
            return
        last = names[-1]


def _records(path):
    # The lines of a file without a header.
    with open(path, "rb") as file:
        while True:
            line = file.readline(limits.LINE)
            if not line:
                return
            yield json.loads(line)


def _both(names, others):
    # The union of two sequences of folders, each sorted as if a `/` ended its names.
    one, other = next(names, None), next(others, None)
    while one is not None or other is not None:
        if other is None or one is not None and one + "/" <= other + "/":
            yield one
            if other == one:
                other = next(others, None)
            one = next(names, None)
        else:
            yield other
            other = next(others, None)
