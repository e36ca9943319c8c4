"""Lets the agent update itself, and cuts the power at every operation of that. The next start is the device's
own: its boot.py, with the agent's modules as they stand on its flash.

    micropython itself.py RELEASES EVERY

In the releases, modules of the agent other than `boot` and the package cannot be imported beside those of the
other release.
"""

import os
import sys

import vfs
from bench import *

ROOT = "/flash"


def forget_agent():
    kept = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "mpypi"}
    for name in kept:
        del sys.modules[name]
    return kept


def power_on(path):
    """What the device does by itself when it is switched on, until it stays on."""
    for _ in range(8):
        ours = forget_agent()
        before = list(sys.path)
        sys.path[:] = [ROOT + "/lib"]
        os.chdir(ROOT)
        try:
            with open(ROOT + "/boot.py") as file:
                names = {}
                exec(file.read(), names)
            return names["answer"], names["release"]
        except SystemExit:
            pass
        finally:
            os.chdir("/")
            sys.path[:] = before
            forget_agent()
            sys.modules.update(ours)
    raise AssertionError("it restarts for ever")


def main(releases, every):
    first, second = Release(releases + "/1"), Release(releases + "/2")
    image = new_littlefs(1024)
    littlefs(image)
    users_files(ROOT)
    update(ROOT, first)
    vfs.umount(ROOT)
    start = bytes(image)

    chip = littlefs(image)
    chip.log = log = []
    store, _ = wake(ROOT)
    assert install(store, second) == "restart"
    answer, release = power_on(ROOT)
    assert answer[0] == "confirming" and release == 2, (answer, release)
    vfs.umount(ROOT)

    image = bytearray(start)
    seen = set()
    for number, (at, data) in enumerate(log):
        if number % int(every) == 0:
            place = "cut at block operation %d of %d" % (number, len(log))
            chip = littlefs(bytearray(image))
            answer, release = power_on(ROOT)
            seen.add((answer[0], release))
            right = (answer[0], release) in (("rest", 1), ("confirming", 2))
            assert right, "%s: %s, %s" % (place, answer, release)
            assert_one_of(ROOT, [[first, second][release - 1].expected()], place)
            vfs.umount(ROOT)
        image[at : at + len(data)] = data
    assert len(seen) == 2, seen
    print("cuts", len(log))


main(*sys.argv[1:])
