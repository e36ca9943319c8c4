"""Cuts the power at every operation of an install, an upgrade and a rollback, and looks what the next start
makes of it.

    micropython cuts.py posix|littlefs RELEASES SCRATCH [EVERY]

RELEASES holds the releases 1 and 2, SCRATCH is an empty folder. Every EVERYth cut is tried, in each of its
ways.
"""

import os
import sys

import vfs
from bench import *
from mpypi.refusal import Refused

ROOT = "/flash"


def rollback(root):
    store, (word, seen) = wake(root)
    if word == "confirming":
        store.give_up("told-to: an operator rolled this release back")
        wake(root)


def until_confirming(root, release):
    store, _ = wake(root)
    assert install(store, release) == "restart"
    assert wake(root)[1][0] == "confirming"


class Scenario:
    """`start` makes the device, `run` is what is cut; `allowed` are the file systems it may leave, the last
    of which `converge` reaches."""

    def __init__(self, name, start, run, allowed, converge):
        self.name, self.start, self.run, self.allowed, self.converge = name, start, run, allowed, converge

    def check(self, root, place):
        """The next starts, after a cut."""
        assert_can_start(root, self.allowed[0], self.allowed[-1], place)
        store, (word, seen) = wake(root)
        assert_one_of(root, self.allowed, place)
        self.converge(root)
        assert_one_of(root, self.allowed[-1:], place + ", converged")
        assert_clean(root, place)


def scenarios(releases):
    first, second = Release(releases + "/1"), Release(releases + "/2")
    empty = {path: sha256(data) for path, data in USERS.items()}

    def upgrade_from(release):
        def start(root):
            users_files(root)
            if release:
                update(root, release)

        return start

    def confirming(root):
        upgrade_from(first)(root)
        until_confirming(root, second)

    yield Scenario(
        "install",
        upgrade_from(None),
        lambda root: update(root, first),
        [empty, first.expected()],
        lambda root: update(root, first),
    )
    yield Scenario(
        "upgrade",
        upgrade_from(first),
        lambda root: update(root, second),
        [first.expected(), second.expected()],
        lambda root: update(root, second),
    )
    yield Scenario("rollback", confirming, rollback, [second.expected(), first.expected()], rollback)


def posix(scenario, scratch, every):
    """-> how many cuts were tried"""
    fs = CutFs(Folder(scratch + "/flash"))
    os.mkdir(scratch + "/flash")
    vfs.mount(fs, ROOT)
    scenario.start(ROOT)
    os.rename(scratch + "/flash", scratch + "/start")
    tried = 0
    cut_at = 1
    while True:
        ways = ["clean"]
        while ways:
            how = ways.pop(0)
            copy_tree(scratch + "/start", scratch + "/flash")
            fs.reset(cut_at, how)
            try:
                scenario.run(ROOT)
            except PowerOff:
                pass
            if not fs.off:
                vfs.umount(ROOT)
                remove_tree(scratch + "/flash")
                remove_tree(scratch + "/start")
                return tried
            if how == "clean":
                ways = fs.ways[1:]
            place = "%s cut at %d, %s" % (scenario.name, cut_at, how)
            fs.reset(0)
            assert_can_start(ROOT, scenario.allowed[0], scenario.allowed[-1], place)
            # Then once more, somewhere in what the next start does.
            fs.reset(cut_at % 37 + 1, how)
            try:
                wake(ROOT)
            except PowerOff:
                pass
            fs.reset(0)
            scenario.check(ROOT, place)
            remove_tree(scratch + "/flash")
            tried += 1
        cut_at += every


def littlefs_cuts(scenario, scratch, every):
    """-> how many cuts were tried"""
    image = new_littlefs(192)
    littlefs(image)
    scenario.start(ROOT)
    vfs.umount(ROOT)
    start = bytes(image)

    chip = littlefs(image)
    chip.log = log = []
    scenario.run(ROOT)
    vfs.umount(ROOT)

    image = bytearray(start)
    tried = 0
    for number, (at, data) in enumerate(log):
        if number % every == 0:
            for torn in (0, len(data) // 2):
                after = bytearray(image)
                after[at : at + torn] = data[:torn]
                littlefs(after)
                scenario.check(ROOT, "%s cut at block operation %d, %d bytes" % (scenario.name, number, torn))
                vfs.umount(ROOT)
                tried += 1
        image[at : at + len(data)] = data
    return tried


def main(kind, releases, scratch, every="1"):
    cut = {"posix": posix, "littlefs": littlefs_cuts}[kind]
    for scenario in scenarios(releases):
        try:
            print(scenario.name, cut(scenario, scratch, int(every)))
        except Refused as refusal:
            print(refusal.text)
            raise


main(*sys.argv[1:])
