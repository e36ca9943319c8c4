"""What a user's boot.py relies on: `boot.run` raises nothing, counts a start once, and keeps their files.

    micropython starts.py RELEASES
"""

import os
import sys

import vfs
from bench import *
from mpypi import boot
from mpypi.commit import needed_to_start

ROOT = "/flash"


def switched_on():
    """`boot.run` in a fresh start."""
    boot._ran.clear()
    boot._found.clear()
    return boot.run(ROOT)


def a_start_is_counted_once(first, second):
    store, _ = wake(ROOT)
    install(store, second)
    for start in range(1, 4):
        assert switched_on()[0] == "confirming"
        # The agent, and whoever asks again, get the same answer.
        assert boot.run(ROOT)[0] == "confirming"
        assert Store(ROOT).boot()[0] == "confirming"
        assert boot.read(ROOT + boot.JOURNAL)["boots"] == start
    # One too many: it is taken back, and the device restarts with what it had.
    try:
        switched_on()
        raise AssertionError("it did not restart")
    except SystemExit:
        pass
    word, seen = switched_on()
    assert word == "rest" and seen["refused"]["rolled_back"], seen
    assert seen["refused"]["error"].startswith("not-confirmed: the release was started 3 times"), seen
    assert_one_of(ROOT, [first.expected()], "taken back")


def a_release_is_confirmed_by_the_application(first, second):
    assert not boot.confirm(ROOT)
    store, _ = wake(ROOT)
    install(store, second)
    assert switched_on()[0] == "confirming"
    assert boot.confirm(ROOT)
    assert not boot.confirm(ROOT)
    assert switched_on()[0] == "rest"
    assert_one_of(ROOT, [second.expected()], "confirmed")
    assert_clean(ROOT, "confirmed")


def a_damaged_record_is_told_and_nothing_else_happens(first, second):
    before = walk(ROOT)
    texts = [b"", b"{", b"[]\n", b"\xff\n", b'{"format":9}\n', b'{"format":1}\n']
    for text in texts + [b'{"format":1,"step":"x","seen":{}}\n']:
        write(ROOT + boot.JOURNAL, text)
        word, why = switched_on()
        assert word == "failed" and why, (text, word)
        assert walk(ROOT) == before
    os.remove(ROOT + boot.JOURNAL)
    assert switched_on()[0] == "rest"


def a_plan_that_is_damaged_is_told_and_the_device_goes_on(first, second):
    store, _ = wake(ROOT)
    install(store, second)
    journal = boot.read(ROOT + boot.JOURNAL)
    journal["step"] = "rollback"
    boot.write_journal(ROOT, journal)
    write(ROOT + boot.PLAN, b'{"format":1}\n{"put":')
    assert switched_on()[0] == "failed"
    assert_one_of(ROOT, [second.expected()], "damaged")


def a_device_without_the_agent_in_its_release_keeps_it(first, second):
    os.mkdir(ROOT + "/lib/mpypi")
    write(ROOT + "/lib/mpypi/boot.py", b"agent")
    # As if it had come from the channel.
    with open(ROOT + boot.INSTALLED) as file:
        text = file.read()
    lines = text.split("\n")
    at = [n for n, line in enumerate(lines) if '"settings.json"' in line][0]
    lines.insert(at, '{"file":"lib/mpypi/boot.py","digest":"%s"}' % sha256(b"agent"))
    write(ROOT + boot.INSTALLED, "\n".join(lines).encode())
    update(ROOT, second)
    assert walk(ROOT)["lib/mpypi/boot.py"] == sha256(b"agent")


def what_is_needed_to_start_is_known(first, second):
    for path in ("boot.py", "a/b.mpy", "settings.json", "lib/x.txt", "lib/mpypi/key.der", "lib/blink/x.py"):
        assert needed_to_start(path), path
    for path in ("a/b.txt", "lib/blink/x.txt", "library/x"):
        assert not needed_to_start(path), path


def a_wheel_is_unpacked_where_there_is_no_deflate(first, second):
    # MicroPython 1.20 has `zlib.DecompIO` instead. Ours is made of what there is.
    import deflate

    windows = []

    class Zlib:
        @staticmethod
        def DecompIO(file, bits):
            windows.append(bits)
            return deflate.DeflateIO(file, deflate.RAW, -bits)

    sys.modules["deflate"] = Zlib
    sys.modules["zlib"] = Zlib
    try:
        update(ROOT, second)
    finally:
        del sys.modules["deflate"], sys.modules["zlib"]
    assert windows and all(-15 <= bits <= -8 for bits in windows), windows
    assert_one_of(ROOT, [second.expected()], "without deflate")


def main(releases):
    first, second = Release(releases + "/1"), Release(releases + "/2")
    for test in (
        a_start_is_counted_once,
        a_release_is_confirmed_by_the_application,
        a_damaged_record_is_told_and_nothing_else_happens,
        a_plan_that_is_damaged_is_told_and_the_device_goes_on,
        a_device_without_the_agent_in_its_release_keeps_it,
        what_is_needed_to_start_is_known,
        a_wheel_is_unpacked_where_there_is_no_deflate,
    ):
        boot._ran.clear()
        boot._found.clear()
        littlefs(new_littlefs(192))
        users_files(ROOT)
        update(ROOT, first)
        test(first, second)
        vfs.umount(ROOT)
        print(test.__name__)


main(*sys.argv[1:])
