"""Cuts the power at every operation of a download in chunks, and looks whether the next start goes on where it was.

    micropython chunks.py posix|littlefs|changes RELEASES SCRATCH [EVERY]

RELEASES holds the releases 1 and 2, the latter with packages in chunks; SCRATCH is an empty folder.
Every EVERYth cut is tried, in each of its ways.
"""

import os
import sys

import vfs
from bench import *

ROOT = "/flash"


def download(release):
    """What an agent does until all of the release is there. Yields (digest, number) of each chunk that is fetched."""
    store, (word, _) = wake(ROOT)
    assert word == "rest"
    bitmap, _ = store.survey(release.iterate)
    for number, entry in enumerate(release.entries):
        if bitmap[number >> 3] & 1 << (number & 7) and "chunks" in entry:
            for chunk in fetch_chunks(ROOT, release, entry):
                yield entry["pkg_sha256"], chunk
    fetch(store, release)


class Cut:
    """A device with the first release that has just accepted the second one."""

    def __init__(self, first, second):
        self.first, self.second = first, second
        self.all = set()
        for entry in second.entries:
            for number in range(entry["chunks"][1] if "chunks" in entry else 0):
                self.all.add((entry["pkg_sha256"], number))
        assert len(self.all) > 6

    def start(self):
        users_files(ROOT)
        update(ROOT, self.first)
        store, _ = wake(ROOT)
        store.remember(self.second.seen())

    def check(self, got, cuts, place):
        """After so many cuts: what came before is not fetched again, and all the rest is. `got`: what had come for
        sure."""
        assert_one_of(ROOT, [self.first.expected()], place)
        more = list(download(self.second))
        again = got.intersection(more)
        assert not again, "%s: fetched once more: %s" % (place, again)
        # The one that was coming may be there, whole.
        lacks = self.all.difference(more).difference(got)
        assert len(lacks) <= cuts, "%s: never fetched: %s" % (place, lacks)
        assert len(more) == len(set(more)), "%s: fetched twice: %s" % (place, more)
        update(ROOT, self.second)
        assert_one_of(ROOT, [self.second.expected()], place + ", converged")
        assert_clean(ROOT, place)


def collect(release, got):
    for chunk in download(release):
        got.add(chunk)


def posix(cut, scratch, every):
    """-> how many cuts were tried"""
    fs = CutFs(Folder(scratch + "/flash"))
    os.mkdir(scratch + "/flash")
    vfs.mount(fs, ROOT)
    cut.start()
    os.rename(scratch + "/flash", scratch + "/start")
    tried = 0
    cut_at = 1
    while True:
        ways = ["clean"]
        while ways:
            how = ways.pop(0)
            copy_tree(scratch + "/start", scratch + "/flash")
            got = set()
            # Twice: the second time somewhere in what goes on.
            for at in (cut_at, cut_at % 37 + 1):
                fs.reset(at, how)
                try:
                    collect(cut.second, got)
                except PowerOff:
                    pass
                if at == cut_at:
                    over = not fs.off
                    if how == "clean" and not over:
                        ways = fs.ways[1:]
            if over:
                vfs.umount(ROOT)
                return tried
            fs.reset(0)
            cut.check(got, 2, "cut at %d, %s" % (cut_at, how))
            remove_tree(scratch + "/flash")
            tried += 1
        cut_at += every


def littlefs_cuts(cut, scratch, every):
    """-> how many cuts were tried"""
    image = new_littlefs(256)
    littlefs(image)
    cut.start()
    vfs.umount(ROOT)
    start = bytes(image)

    chip = littlefs(image)
    chip.log = log = []
    came = []  # chunks, and how many operations it took until they were there
    for chunk in download(cut.second):
        came.append((len(log), chunk))
    vfs.umount(ROOT)

    image = bytearray(start)
    tried = 0
    for number, (at, data) in enumerate(log):
        got = set([chunk for operations, chunk in came if operations <= number])
        for torn in (0, len(data) // 2) if number % every == 0 else ():
            after = bytearray(image)
            after[at : at + torn] = data[:torn]
            littlefs(after)
            cut.check(got, 1, "cut at block operation %d, %d bytes" % (number, torn))
            vfs.umount(ROOT)
            tried += 1
        image[at : at + len(data)] = data
    return tried


def changes(cut, *_):
    """Changes one byte of what has come, in each chunk: that one and what follows it is fetched again, and nothing else.
    -> how many were changed"""
    second = cut.second
    entry = [entry for entry in second.entries if "chunks" in entry][0]
    size, count, _ = entry["chunks"]
    path = ROOT + "/.mpypi/staging/" + entry["pkg_sha256"] + ".chunks"
    image = new_littlefs(256)
    littlefs(image)
    cut.start()
    coming = fetch_chunks(ROOT, second, entry)
    while next(coming) < count - 2:
        pass
    vfs.umount(ROOT)

    def fetched_after(change):
        littlefs(bytearray(image))
        with open(path, "r+b") as file:
            change(file)
        wake(ROOT)
        numbers = list(fetch_chunks(ROOT, second, entry))
        update(ROOT, second)
        assert_one_of(ROOT, [second.expected()], "changed")
        vfs.umount(ROOT)
        return numbers

    for number in range(count - 1):

        def change(file):
            at = number * size + 77 * number % size
            file.seek(at)
            byte = file.read(1)[0] ^ 1 << number % 8
            file.seek(at)
            file.write(bytes([byte]))

        numbers = fetched_after(change)
        assert numbers == list(range(number, count)), (number, numbers)

    def append(file):
        file.seek((count - 1) * size)
        file.write(bytes(2 * size))

    # Nothing is changed, nothing is there but too much.
    assert fetched_after(lambda file: None) == [count - 1]
    assert fetched_after(append) == list(range(count))
    return count + 1


def main(kind, releases, scratch, every="1"):
    cut = Cut(Release(releases + "/1"), Release(releases + "/2"))
    print(kind, {"posix": posix, "littlefs": littlefs_cuts, "changes": changes}[kind](cut, scratch, int(every)))


main(*sys.argv[1:])
