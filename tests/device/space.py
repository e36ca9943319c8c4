"""Fills the flash up: at every operation of an upgrade, and with every little more room than is needed for
nothing.

    micropython space.py posix|littlefs RELEASES SCRATCH [EVERY]
"""

import os
import sys

import vfs
from bench import *
from mpypi import boot
from mpypi.refusal import Refused

ROOT = "/flash"


def attempt(root, release):
    """What an agent does where the flash may be full: it gives up, and makes room."""
    try:
        update(root, release)
    except Refused as refusal:
        assert refusal.word in ("no-space", "storage"), refusal.text
        store, (word, _) = wake(root)
        if word == "rest":
            store.discard()
    except OSError as error:
        # The start failed. Another may succeed.
        assert error.args[0] == ENOSPC, error


def check(first, second, place):
    """-> which release the device has"""
    wake(ROOT)
    return assert_one_of(ROOT, [first.expected(), second.expected()], place)


def posix(first, second, scratch, every):
    os.mkdir(scratch + "/flash")
    fs = CutFs(Folder(scratch + "/flash"))
    vfs.mount(fs, ROOT)
    users_files(ROOT)
    update(ROOT, first)
    os.rename(scratch + "/flash", scratch + "/start")

    def tries(settings, number):
        found = set()
        while True:
            copy_tree(scratch + "/start", scratch + "/flash")
            fs.reset(0)
            last = settings(number)
            # Twice: the second start is the user's who turned it off and on again.
            for _ in range(2):
                attempt(ROOT, second)
            place = "full, %s" % number
            found.add(check(first, second, place))
            fs.reset(0)
            update(ROOT, second)
            assert_one_of(ROOT, [second.expected()], place + ", then enough")
            assert_clean(ROOT, place)
            remove_tree(scratch + "/flash")
            if last():
                return found
            number += every

    def full_from(number):
        fs.reset(0, capacity=1 << 20)
        fs.full_at = number
        return lambda: fs.done < number

    def room_for(number):
        fs.reset(0, capacity=0)
        fs.capacity = fs.used + 50 * number
        return lambda: number >= 600

    found = tries(full_from, 1)
    assert len(found) == 2, found
    found = tries(room_for, 0)
    assert len(found) == 2, found
    vfs.umount(ROOT)


def littlefs_full(first, second, scratch, every):
    found = set()
    for blocks in range(0, 120, every):
        image = new_littlefs(256)
        littlefs(image)
        users_files(ROOT)
        update(ROOT, first)
        with open(ROOT + "/filling", "wb") as file:
            filling = bytes(256)
            try:
                while os.statvfs(ROOT)[3] > blocks:
                    file.write(filling)
                    file.flush()
            except OSError:
                pass
        place = "%d blocks free" % blocks
        with_filling = {"filling": files.digest(ROOT + "/filling")}
        for _ in range(2):
            attempt(ROOT, second)
        wake(ROOT)
        allowed = [first.expected(), second.expected()]
        for release in allowed:
            release.update(with_filling)
        found.add(assert_one_of(ROOT, allowed, place))
        os.remove(ROOT + "/filling")
        update(ROOT, second)
        assert_one_of(ROOT, [second.expected()], place + ", then enough")
        assert_clean(ROOT, place)
        vfs.umount(ROOT)
    assert len(found) == 2, found


def main(kind, releases, scratch, every="1"):
    first, second = Release(releases + "/1"), Release(releases + "/2")
    {"posix": posix, "littlefs": littlefs_full}[kind](first, second, scratch, int(every))


main(*sys.argv[1:])
