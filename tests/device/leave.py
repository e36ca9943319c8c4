"""Leaves devices behind in the middle of an upgrade, for agent-sim to finish.

    micropython leave.py RELEASES DEVICES EVERY
"""

import os
import sys

import vfs
from bench import *

ROOT = "/flash"


def main(releases, devices, every):
    first, second = Release(releases + "/1"), Release(releases + "/2")
    cut_at = left = 0
    while True:
        cut_at += int(every)
        top = devices + "/%d" % cut_at
        os.mkdir(top)
        fs = CutFs(Folder(top))
        vfs.mount(fs, ROOT)
        users_files(ROOT)
        update(ROOT, first)
        fs.reset(cut_at, "torn")
        try:
            update(ROOT, second)
        except PowerOff:
            pass
        vfs.umount(ROOT)
        if not fs.off:
            remove_tree(top)
            print("left", left)
            return
        left += 1


main(*sys.argv[1:])
