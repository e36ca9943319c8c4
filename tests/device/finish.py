"""Finishes what agent-sim left in the middle of an upgrade.

    micropython finish.py RELEASES DEVICES
"""

import os
import sys

from bench import *


def main(releases, devices):
    first, second = Release(releases + "/1"), Release(releases + "/2")
    finished = 0
    for entry in list(os.ilistdir(devices)):
        root = devices + "/" + entry[0]
        assert_can_start(root, first.expected(), second.expected(), root)
        wake(root)
        assert_one_of(root, [first.expected(), second.expected()], root)
        update(root, second)
        assert_one_of(root, [second.expected()], root)
        assert_clean(root, root)
        finished += 1
    print("finished", finished)


main(*sys.argv[1:])
