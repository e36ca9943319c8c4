"""Verifies what was signed, with as little memory as it takes beside the modules that it takes.

    micropython -m verify list|root FOLDER [only]

`list`: FOLDER/list.json, by the root in FOLDER/1.json. `root`: FOLDER/2.json, by that root. With `only`, it is
not verified: the modules alone are brought in.
"""

import sys

from mpypi import boot, files, keys, refusal, rsa

what, folder = sys.argv[1:3]
old = folder + "/1.json"
if what == "root":
    from mpypi import roots
if len(sys.argv) == 3:
    if what == "root":
        roots.step(old, folder + "/2.json", roots.version(old) + 1)
    else:
        signers = keys.Signers(old, "dev")
        signers.check_expiry("2026-11-28T00:00:00")
        rsa.check(folder + "/list.json", signers)
print("ok")
