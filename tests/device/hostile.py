"""Gives a device wheels that are not what they should be.

    micropython hostile.py CASES

CASES holds the release `good`, and a folder for each case, whose release.json says in `refused` with which
words it is refused; null where it is installed.
"""

import os
import sys

import vfs
from bench import *
from mpypi import limits
from mpypi.refusal import Refused

ROOT = "/flash"


def main(cases):
    # So that a bomb is one on a small flash, too.
    limits.WHEEL_UNPACKED = 100000
    good = Release(cases + "/good")
    names = sorted(entry[0] for entry in os.ilistdir(cases) if entry[0] != "good")
    for name in names:
        littlefs(new_littlefs(1024))
        users_files(ROOT)
        update(ROOT, good)
        case = Release(cases + "/" + name)
        refused = None
        try:
            update(ROOT, case)
        except Refused as refusal:
            refused = refusal.text
            store, (word, _) = wake(ROOT)
            assert word == "rest"
            if refusal.verdict == "reject":
                store.refuse(refused)
                assert store.seen["refused"] == {"error": refused, "rolled_back": False}
            else:
                store.discard()
        if case.refused is None:
            assert refused is None, "%s: %s" % (name, refused)
            assert_one_of(ROOT, [case.expected()], name)
        else:
            assert refused and all(word in refused for word in case.refused), "%s: %s" % (name, refused)
            assert_one_of(ROOT, [good.expected()], name)
        assert_clean(ROOT, name)
        vfs.umount(ROOT)
        print(name, refused)


main(*sys.argv[1:])
