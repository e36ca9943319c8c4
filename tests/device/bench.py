"""What the tests of the device's store share: releases made by the Rust side, an update without a connection,
and flashes whose power goes off."""

import hashlib
import json
import os
import sys

import vfs
from mpypi import boot, chunks, files, lists
from mpypi.agent import Job
from mpypi.commit import needed_to_start
from mpypi.store import Store

ENOSPC = 28
# What the user put on the device.
USERS = {"notes.txt": b"mine", "log.txt": b"boot"}


class PowerOff(BaseException):
    """The power is off. Nothing of the agent's catches it."""


class Release:
    """A release: its entries, its packages, and what a device has when it is applied."""

    def __init__(self, folder):
        with open(folder + "/release.json") as file:
            for key, value in json.load(file).items():
                setattr(self, key, value)
        self.packages = folder + "/packages/"
        # As a device reads them: those in chunks know where in the list their digests are.
        self.path = folder + "/list.json"
        self.entries = [entry for entry in lists.read(self.path) if entry["type"] in ("wheel", "src")]

    def seen(self):
        return {"channel": "dev", "sequence": self.sequence, "version": self.version, "list": self.list}

    def iterate(self):
        return iter(self.entries)

    def expected(self):
        """The digests of the files of a device that had the user's own."""
        found = {path: sha256(data) for path, data in USERS.items()}
        found.update(self.files)
        return found


def sha256(data):
    return files.hexlify(hashlib.sha256(data).digest())


def write(path, data):
    with open(path, "wb") as file:
        file.write(data)


def users_files(root):
    for name, data in USERS.items():
        write(root + "/" + name, data)


def wake(root):
    """Starts the device until it stays on. -> its store, what the start found"""
    for _ in range(8):
        store = Store(root)
        found = store.boot()
        if found[0] != "restart":
            return store, found
    raise AssertionError("it restarts for ever")


def fetch(store, release):
    """Fetches what is missing. -> how many packages, whole or in chunks"""
    bitmap, _ = store.survey(release.iterate)
    fetched = 0
    for number, entry in enumerate(release.entries):
        if bitmap[number >> 3] & 1 << (number & 7):
            if "chunks" in entry:
                for _ in fetch_chunks(store.root, release, entry):
                    pass
            else:
                _fetch(store.receive(entry), release, 0, entry["size"])
            fetched += 1
    return fetched


def fetch_chunks(root, release, entry):
    """Fetches those chunks of a package that are missing, and stages it. Yields the number of each as soon as it is on
    the flash."""
    job = Job(None)
    job.chunks = entry, 0, 0
    size, count, _ = entry["chunks"]
    while True:
        for _ in chunks.count(root, release.path, job):
            pass
        number = job.chunks[1]
        if number == count:
            return
        while number < count:
            _fetch(chunks.Chunk(root, release.path, job), release, number * size, size)
            yield number
            number += 1
            assert job.chunks[1] == number


def _fetch(incoming, release, at, left):
    piece = bytearray(500)
    view = memoryview(piece)
    with open(release.packages + incoming.entry["pkg_sha256"], "rb") as file:
        file.seek(at)
        while left:
            length = file.readinto(view[: min(left, len(piece))])
            if not length:
                break
            incoming.write(view[:length])
            left -= length
    incoming.finish()


def install(store, release):
    """Fetches, stages and commits. -> `Store.commit`'s answer"""
    store.remember(release.seen())
    fetch(store, release)
    store.stage(release.seen(), release.iterate)
    return store.commit()


def update(root, release):
    """What an agent does from one start to its rest, confirming as it goes."""
    store, (word, seen) = wake(root)
    if word == "confirming":
        store.confirm()
    if store.head.get("list") != release.list:
        if install(store, release) == "restart":
            store, (word, seen) = wake(root)
            assert word == "confirming", word
            store.confirm()


def walk(root, top=""):
    """Every file below `root` with its digest, without the agent's folder; folders as `name/`."""
    found = {}
    for entry in os.ilistdir(root + "/" + top if top else root or "/"):
        name = top + "/" + entry[0] if top else entry[0]
        if entry[1] == 0x4000:
            if name != ".mpypi":
                inside = walk(root, name)
                found.update(inside)
                if not inside:
                    found[name + "/"] = ""
        else:
            found[name] = files.digest(root + "/" + name)
    return found


def ours(root):
    """What the agent keeps, without the folders that are always there."""
    names = [entry[0] for entry in os.ilistdir(root + "/.mpypi")]
    for folder in ("staging", "old"):
        if folder in names:
            names.remove(folder)
            names += [folder + "/" + entry[0] for entry in os.ilistdir(root + "/.mpypi/" + folder)]
    return sorted(names)


def assert_clean(root, place):
    left = ours(root)
    left += [name for name, digest in walk(root).items() if not digest]
    assert left in (["installed.jsonl", "seen.json"], ["seen.json"]), "%s: %s is left" % (place, left)


def assert_can_start(root, old, new, place):
    """Before anything is written, what a start needs is there, old or new."""
    for path in old:
        if path in new and needed_to_start(path):
            assert files.digest(root + "/" + path) in (old[path], new[path]), "%s: %s is gone" % (place, path)


def assert_one_of(root, allowed, place):
    """The device has one of `allowed`, complete. A folder that is left empty does not count: while a release
    waits to be confirmed, it may be needed again."""
    found = {name: digest for name, digest in walk(root).items() if digest}
    for number, release in enumerate(allowed):
        if found == release:
            return number
    last = allowed[-1]
    differing = [name for name in set(list(found) + list(last)) if found.get(name) != last.get(name)]
    raise AssertionError("%s: neither release; not of the last: %s" % (place, sorted(differing)))


# A flash in a folder, through MicroPython's own VfsPosix.


class Folder:
    """A `VfsPosix` below a folder. It has a root of its own, too, with which it cannot rename (1.28)."""

    def __init__(self, top):
        self.top = top
        self.posix = vfs.VfsPosix()

    def rename(self, old, new):
        self.posix.rename(self.top + old, self.top + new)

    def __getattr__(self, name):
        method = getattr(self.posix, name)
        return lambda path, *more: method(self.top + path, *more)


class CutFs:
    """Counts what changes the file system below it, and cuts the power at operation `cut_at`, in one of three
    ways: "clean", "torn" (half of the bytes being written are there) or "lost" (bytes not flushed are gone);
    `ways` says which make a difference. Holds at most `capacity` bytes; at operation `full_at`, another takes
    all the room."""

    def __init__(self, inner):
        self.inner = inner
        self.reset(0)

    def reset(self, cut_at, how="clean", capacity=None):
        self.done = 0
        self.cut_at = cut_at
        self.how = how
        self.full_at = None
        self.off = False
        self.unsynced = {}
        self.capacity = capacity
        self.used = self._used("/") if capacity is not None else 0

    def _used(self, path):
        used = 0
        for entry in self.inner.ilistdir(path):
            inside = path + "/" + entry[0]
            used += self._used(inside) if entry[1] == 0x4000 else self.inner.stat(inside)[6]
        return used

    def change(self, tear=None):
        """Before each operation."""
        if self.off:
            raise PowerOff
        self.done += 1
        if self.done == self.full_at:
            self.capacity = self.used
        if self.done == self.cut_at:
            self.ways = ["clean"] + (["torn"] if tear else []) + (["lost"] if self.unsynced else [])
            if tear and self.how == "torn":
                tear()
            self.off = True
            if self.how == "lost":
                for path, durable in self.unsynced.items():
                    with self.inner.open(path, "rb") as file:
                        data = file.read(durable)
                    with self.inner.open(path, "wb") as file:
                        file.write(data)
            raise PowerOff

    def free_up(self, path):
        if self.capacity is not None:
            try:
                self.used -= self.inner.stat(path)[6]
            except OSError:
                pass

    def take_up(self, length):
        if self.capacity is not None:
            if self.used + length > self.capacity:
                raise OSError(ENOSPC)
            self.used += length

    # What `vfs.mount` wants.

    def mount(self, readonly, mkfs):
        pass

    def umount(self):
        pass

    def open(self, path, mode):
        if "r" in mode and "+" not in mode:
            return self.inner.open(path, mode)
        self.change()
        if "w" in mode:
            self.free_up(path)
        return _CutFile(self, path, self.inner.open(path, mode), mode)

    def ilistdir(self, path):
        return self.inner.ilistdir(path)

    def stat(self, path):
        return self.inner.stat(path)

    def statvfs(self, path):
        if self.capacity is None:
            return self.inner.statvfs(path)
        free = self.capacity - self.used
        return (1, 1, self.capacity, free, free, 0, 0, 0, 0, 255)

    def mkdir(self, path):
        self.change()
        self.inner.mkdir(path)

    def rmdir(self, path):
        self.change()
        self.inner.rmdir(path)

    def remove(self, path):
        self.change()
        self.free_up(path)
        self.inner.remove(path)
        self.unsynced.pop(path, None)

    def rename(self, old, new):
        self.change()
        self.free_up(new)
        self.inner.rename(old, new)
        self.unsynced.pop(new, None)
        if old in self.unsynced:
            self.unsynced[new] = self.unsynced.pop(old)


class _CutFile:
    def __init__(self, fs, path, file, mode):
        self.fs, self.path, self.file = fs, path, file
        self.length = 0 if "w" in mode else fs.inner.stat(path)[6]
        self.at = self.length if "a" in mode else 0
        fs.unsynced[path] = self.length

    def seek(self, at):
        assert at <= self.length, "a hole"
        self.at = at
        self.file.seek(at)

    def write(self, data):
        if isinstance(data, str) and not isinstance(data, bytes):
            data = data.encode()
        half = len(data) // 2
        self.fs.change(lambda: self.file.write(bytes(data[:half])))
        self.at += len(data)
        if self.at > self.length:
            self.fs.take_up(self.at - self.length)
            self.length = self.at
        return self.file.write(data)

    def flush(self):
        self.fs.change()
        self.file.flush()
        self.fs.unsynced.pop(self.path, None)

    def close(self):
        self.file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def remove_tree(path):
    for entry in list(os.ilistdir(path)):
        inside = path + "/" + entry[0]
        if entry[1] == 0x4000:
            remove_tree(inside)
        else:
            os.remove(inside)
    os.rmdir(path)


def copy_tree(source, target):
    os.mkdir(target)
    for entry in list(os.ilistdir(source)):
        a, b = source + "/" + entry[0], target + "/" + entry[0]
        if entry[1] == 0x4000:
            copy_tree(a, b)
        else:
            with open(a, "rb") as one, open(b, "wb") as other:
                other.write(one.read())


# A flash chip in memory, for littlefs.


class Chip:
    """A block device in memory. It writes down what changes it, for a power cut at any of them."""

    SIZE = 512

    def __init__(self, image):
        self.image = image
        self.log = None
        self.fresh()

    def fresh(self):
        self.cut_at = 0
        self.done = 0

    def readblocks(self, block, buffer, offset=0):
        at = block * self.SIZE + offset
        buffer[:] = self.image[at : at + len(buffer)]

    def writeblocks(self, block, buffer, offset=0):
        self.change(block * self.SIZE + offset, bytes(buffer))

    def ioctl(self, operation, argument):
        if operation == 4:
            return len(self.image) // self.SIZE
        if operation == 5:
            return self.SIZE
        if operation == 6:
            self.change(argument * self.SIZE, b"\xff" * self.SIZE)
            return 0

    def change(self, at, data):
        if self.log is not None:
            self.log.append((at, data))
        self.image[at : at + len(data)] = data


def littlefs(image):
    """Mounts the littlefs in `image` at /flash. -> the chip"""
    chip = Chip(image)
    vfs.mount(vfs.VfsLfs2(chip, readsize=32, progsize=32, lookahead=32), "/flash")
    return chip


def new_littlefs(blocks):
    """An image with an empty littlefs."""
    image = bytearray(b"\xff" * (blocks * Chip.SIZE))
    vfs.VfsLfs2.mkfs(Chip(image), readsize=32, progsize=32, lookahead=32)
    return image
