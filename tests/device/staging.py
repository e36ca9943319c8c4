"""Changes one byte of what a device has fetched, everywhere, before it is staged.

    micropython staging.py RELEASES EVERY
"""

import os
import sys

import vfs
from bench import *
from mpypi.refusal import Refused

ROOT = "/flash"


def main(releases, every):
    first, second = Release(releases + "/1"), Release(releases + "/2")
    image = new_littlefs(192)
    littlefs(image)
    users_files(ROOT)
    update(ROOT, first)
    store, _ = wake(ROOT)
    store.remember(second.seen())
    assert fetch(store, second) > 2
    names = [entry[0] for entry in os.ilistdir(ROOT + "/.mpypi/staging")]
    sizes = [os.stat(ROOT + "/.mpypi/staging/" + name)[6] for name in names]
    vfs.umount(ROOT)
    tried = 0
    for name, size in zip(names, sizes):
        for at in range(0, size, int(every)):
            littlefs(bytearray(image))
            with open(ROOT + "/.mpypi/staging/" + name, "r+b") as file:
                file.seek(at)
                byte = file.read(1)[0] ^ 1 << at % 8
                file.seek(at)
                file.write(bytes([byte]))
            place = "%s changed at %d" % (name, at)
            # The start finds it, and it is fetched again.
            store, (word, _) = wake(ROOT)
            assert word == "rest"
            assert name not in [entry[0] for entry in os.ilistdir(ROOT + "/.mpypi/staging")], place
            update(ROOT, second)
            assert_one_of(ROOT, [second.expected()], place)
            assert_clean(ROOT, place)
            vfs.umount(ROOT)

            # Changed after the start, it is no wheel that is bad, but the flash: it is tried again.
            chip = littlefs(bytearray(image))
            store, _ = wake(ROOT)
            with open(ROOT + "/.mpypi/staging/" + name, "r+b") as file:
                file.seek(at)
                file.write(bytes([byte]))
            try:
                if install(store, second) == "restart":
                    wake(ROOT)[0].confirm()
            except Refused as refusal:
                assert refusal.verdict == "retry", "%s: %s" % (place, refusal.text)
                update(ROOT, second)
            found = walk(ROOT)
            expected = second.expected()
            # A src file is not read again before it is put in its place.
            changed = [path for path in expected if found.get(path) != expected[path]]
            assert not [path for path in changed if path.startswith("lib/")], "%s: %s" % (place, changed)
            vfs.umount(ROOT)
            tried += 1
    print("changed", tried)


main(*sys.argv[1:])
