"""Installs a release with one large wheel, and says how much memory that takes beyond what was in use before.

    micropython -X heapsize=96k unpack.py RELEASE ROOT
"""

import gc
import os
import sys

sys.path.append("x")  # so that the list has grown already
from mpypi import boot, files
from mpypi.store import Store


class Entries:
    # The entries of release.json would not fit: its wheel is all we need.
    def __init__(self, folder):
        with open(folder + "/one.json", "rb") as file:
            self.entry = boot.json.loads(file.read())

    def __call__(self):
        return iter((self.entry,))


def main(folder, root):
    entries = Entries(folder)
    entry = entries.entry
    piece = bytearray(512)
    seen = {"channel": "dev", "sequence": 1, "version": "1.0", "list": entry["pkg_sha256"]}
    store = Store(root)
    store.boot()
    store.remember(seen)
    gc.collect()
    before = gc.mem_alloc()
    bitmap, _ = store.survey(entries)
    assert bitmap[0] == 1
    incoming = store.receive(entry)
    with open(folder + "/packages/" + entry["pkg_sha256"], "rb") as file:
        while True:
            length = file.readinto(piece)
            if not length:
                break
            incoming.write(memoryview(piece)[:length])
    incoming.finish()
    incoming = file = bitmap = None
    gc.collect()
    assert store.stage(seen, entries)
    store.commit()
    gc.collect()
    print("before", before)
    print("modules", gc.mem_alloc() - before)


main(*sys.argv[1:])
