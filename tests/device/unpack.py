"""Unpacks a large wheel with every module in memory already, or says only how much is left beside them.

    micropython -X heapsize=48k unpack.py FOLDER ROOT [only]

FOLDER holds the wheel as packages/<sha256>, and its entry as entry.json.
"""

import gc
import sys

from mpypi import boot, files, wheel
from mpypi.store import Store


def main(folder, root, only=None):
    with open(folder + "/entry.json", "rb") as file:
        entry = boot.json.loads(file.read())
    store = Store(root)
    store.boot()
    package = root + boot.STAGING + "/" + entry["pkg_sha256"]
    with open(folder + "/packages/" + entry["pkg_sha256"], "rb") as file, open(package, "wb") as out:
        while True:
            length = file.readinto(files.piece)
            if not length:
                break
            out.write(files.piece[:length])
    gc.collect()
    if only:
        return
    # Threshold 1: garbage is collected at every allocation, so that only what is held counts.
    gc.threshold(1)
    paths = []
    wheel.unpack(root, entry, lambda path, digest: False, lambda path, digest: paths.append(len(path)))
    assert len(paths) == 3, paths


main(*sys.argv[1:])
