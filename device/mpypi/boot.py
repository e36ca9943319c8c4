"""What a start of the device needs, and nothing else. A user's boot.py begins with

    from mpypi import boot
    boot.run()

After a power cut in the middle of an update of the agent itself, old and new modules stand side by side: this
one imports none of ours, and `mpypi/__init__.py` must import none when it is imported.

The records and the steps are those of agent-sim/src/store.rs, whose table is the normative text.
"""

import json
import os
import sys
from micropython import const

FORMAT = const(1)
FOLDER = "/.mpypi/"
INSTALLED = FOLDER + "installed.jsonl"
SEEN = FOLDER + "seen.json"
JOURNAL = FOLDER + "journal.json"
PLAN = FOLDER + "plan.jsonl"
NEXT = FOLDER + "next.jsonl"
LIST_PART = FOLDER + "list.part"
RESERVE = FOLDER + "reserve"
STAGING = FOLDER + "staging"
OLD = FOLDER + "old"

# How often a release may boot without being confirmed, and a committed install may fail to complete.
_BOOTS = const(3)
# How many names of a folder are in memory at once.
_NAMES = const(32)

_ENOENT = const(2)
_EEXIST = const(17)
_ENOTDIR = const(20)
_ENOSPC = const(28)

NONE = const(0)
FILE = const(1)
DIRECTORY = const(2)

# Where MicroPython has its files.
_here = os.getcwd().rstrip("/")
# What `run` found, by root; and what of it nobody has asked for yet.
_ran = {}
_found = {}


def run(root=""):
    """Finishes or takes back what a journal says, restarts the device where that changed files, counts the
    starts of a release that is not confirmed. Does so once in each start; later calls give the first one's
    answer. Raises nothing.

    -> `start`'s answer, or ("failed", text) where the flash fails.
    """
    root = place(root)
    if root not in _ran:
        try:
            _ran[root] = _found[root] = start(root)
        except Exception as error:
            return "failed", str(error)
        if _ran[root][0] == "restart":
            restart()
    return _ran[root]


def confirm(root=""):
    """The application says that the release works: it is kept. -> whether one was waiting for that"""
    root = place(root)
    journal = read(root + JOURNAL)
    if not journal or journal["step"] != "confirm":
        return False
    journal["step"] = "finish"
    write_journal(root, journal)
    finish(root, journal["seen"])
    return True


def place(root):
    """The root as a prefix of paths: without a `/` at its end."""
    return root.rstrip("/") or _here


def found(root):
    """The answer of `run` in this start, once; else that of a start of our own."""
    return _found.pop(root) if root in _found else start(root)


def restart():
    """Restarts the device."""
    try:
        import machine

        machine.reset()
    except (ImportError, AttributeError):
        # A port without a machine: what started us starts us again.
        raise SystemExit


def start(root):
    """One start. -> a word, and the newest list accepted (or None):

    "rest": the installed release runs; `refused` of the list says whether it was taken back.
    "confirming": a new release runs and is not confirmed yet.
    "restart": files were put in place, or taken back, under what runs now.
    """
    # Before anything is read, something is written: after a power cut in the middle of a rename, littlefs
    # hides the name next to the old one until it has repaired that (`lfs_fs_forceconsistency`).
    for folder in (FOLDER[:-1], STAGING, OLD):
        try:
            os.mkdir(root + folder)
        except OSError as error:
            if error.args[0] != _EEXIST:
                raise
    journal = read(root + JOURNAL)
    if not journal:
        tidy(root)
        if kind(root + LIST_PART) == FILE:
            os.remove(root + LIST_PART)
        seen = read(root + SEEN)
        # Packages of a list that is still to be installed are kept.
        if not seen or "refused" in seen or seen["list"] == header(root + INSTALLED).get("list"):
            clear(root + STAGING)
        return "rest", seen
    step = journal.get("step")
    if step in ("install", "confirm"):
        if journal["boots"] >= _BOOTS and step == "confirm" and journal.get("keep"):
            # What was before is revoked: bad as this one may be, there is nothing to go back to.
            step = journal["step"] = "finish"
        elif journal["boots"] >= _BOOTS:
            text = (
                "not-installed: %d starts did not complete the installation"
                if step == "install"
                else "not-confirmed: the release was started %d times and never confirmed"
            )
            journal["reason"] = text % journal["boots"]
            step = journal["step"] = "rollback"
        else:
            journal["boots"] += 1
        write_journal(root, journal)
    if step == "install":
        redo(root)
        journal["step"] = "confirm"
        journal["boots"] = 0
        write_journal(root, journal)
        return "restart", journal["seen"]
    if step == "confirm":
        return "confirming", journal["seen"]
    if step == "finish":
        finish(root, journal["seen"])
        return "rest", read(root + SEEN)
    if step == "rollback":
        return "restart", _take_back(root, journal)
    raise ValueError("`%s` is damaged" % JOURNAL[1:])


# What is done with a journal.


def redo(root):
    """Does every operation of the plan that is not done. Where a copy of the old file is kept, its place is
    never empty: see `commit`."""
    _with_room(root, _redo, root)
    sync()


def make_folders(root):
    """Makes the folders of the plan."""
    for folder in folders(root + PLAN):
        if kind(root + "/" + folder) == NONE:
            os.mkdir(root + "/" + folder)


def _redo(root):
    make_folders(root)
    number = 0
    for line in lines(root + PLAN):
        if "folder" in line:
            continue
        kept = root + OLD + "/%d" % number
        number += 1
        if "put" in line:
            path = root + "/" + line["put"]
            staged = root + staged_name(line["digest"], line["copy"])
            there = kind(path) == FILE
            if kind(staged) == FILE:
                if line["had"] and there and kind(kept) != FILE:
                    os.rename(path, kept)
                os.rename(staged, path)
            elif not there:
                raise OSError(_ENOENT, staged)
        else:
            path = root + "/" + line["remove"]
            if kind(path) == FILE:
                if kind(kept) == FILE:
                    os.remove(path)
                else:
                    os.rename(path, kept)


def _undo(root):
    """Takes back every operation of the plan that was done. Each is of another path, so any order will do."""
    number = 0
    for line in lines(root + PLAN):
        if "folder" in line:
            continue
        kept = root + OLD + "/%d" % number
        number += 1
        name = line["put"] if "put" in line else line["remove"]
        path = root + "/" + name
        if kind(kept) == FILE:
            end = name.find("/")
            while end > 0:
                if kind(root + "/" + name[:end]) == NONE:
                    os.mkdir(root + "/" + name[:end])
                end = name.find("/", end + 1)
            os.rename(kept, path)
        elif "put" in line and not line["had"] and kind(path) == FILE:
            # Also if the staged file is there: a power cut may have brought its old name back beside the new one.
            os.remove(path)


def _take_back(root, journal):
    _with_room(root, _undo, root)
    sync()
    remove_folders(root, folders(root + PLAN))
    seen = journal["seen"]
    error = journal.get("reason") or "told-to: an operator rolled this release back"
    before = read(root + SEEN)
    if _is_newer(before, seen):
        # What came from the history went wrong: with the list that named it, it is not to be tried again.
        seen = before
    seen["refused"] = {"error": error, "rolled_back": True}
    write_seen(root, seen)
    _end(root)
    return seen


def finish(root, seen):
    """`next` becomes what is installed, and `seen` the newest list accepted."""
    if kind(root + NEXT) == FILE:
        remove_folders(root, _without(folders(root + INSTALLED), folders(root + NEXT)))
        os.rename(root + NEXT, root + INSTALLED)
        sync()
    before = read(root + SEEN)
    if before != seen and not _is_newer(before, seen):
        write_seen(root, seen)
    _end(root)


def _is_newer(one, other):
    # What is installed while a newer list waits for its turn does not make anything older believed again.
    if not one or one["channel"] != other["channel"] or "sequence" not in one or "sequence" not in other:
        return False
    return (one.get("epoch", 0), one["sequence"]) > (other.get("epoch", 0), other["sequence"])


def _end(root):
    # The last steps of a journal, whichever way it went.
    if kind(root + JOURNAL) == FILE:
        os.remove(root + JOURNAL)
        sync()
    tidy(root)
    clear(root + STAGING)


def tidy(root):
    """Removes what means nothing without a journal, and the folders that were made for a release and not
    used."""
    if kind(root + PLAN) == FILE:
        try:
            remove_folders(root, folders(root + PLAN))
        except ValueError:
            # It was being written when the power went off: no folder was made yet.
            pass
    for name in (RESERVE, PLAN, NEXT, SEEN + ".new", JOURNAL + ".new", FOLDER + "root.json.new"):
        if kind(root + name) == FILE:
            os.remove(root + name)
    # A stale old/3 would be taken for operation 3 of the next journal.
    clear(root + OLD)


def remove_folders(root, names):
    """Removes those of `names`, sorted as `folders` gives them, that are empty, innermost first."""
    above = []
    for name in names:
        while above and not name.startswith(above[-1] + "/"):
            _remove_empty(root + "/" + above.pop())
        above.append(name)
    while above:
        _remove_empty(root + "/" + above.pop())


def _remove_empty(path):
    if kind(path) == DIRECTORY:
        # To its end: before MicroPython 1.23 one left half-way keeps the folder open.
        if not sum(1 for _ in os.ilistdir(path)):
            os.rmdir(path)


def _without(names, others):
    # Both are sorted as if a `/` ended each name.
    other = next(others, None)
    for name in names:
        while other is not None and other + "/" < name + "/":
            other = next(others, None)
        if name != other:
            yield name
    for _ in others:
        pass


# Records.


def read(path):
    """The journal, or the newest list accepted; None if there is none."""
    if kind(path) != FILE:
        return None
    record = header(path)
    seen = record.get("seen", record)
    if not isinstance(seen, dict) or "list" not in seen or "channel" not in seen:
        raise ValueError("`%s` is damaged" % path)
    return record


def header(path):
    """The first line of a record; {} if there is none."""
    if kind(path) != FILE:
        return {}
    with open(path, "rb") as file:
        record = _parse(file.readline(), path)
    if record.get("format") != FORMAT:
        raise ValueError("`%s` has format %s, this agent knows %d" % (path, record.get("format"), FORMAT))
    del record["format"]
    return record


def lines(path):
    """The lines of a record, without its header."""
    with open(path, "rb") as file:
        file.readline()
        while True:
            line = file.readline()
            if not line:
                return
            yield _parse(line, path)


def folders(path):
    """The folders that a record names; none if there is no record."""
    if kind(path) == FILE:
        for line in lines(path):
            if "folder" in line:
                yield line["folder"]


def _parse(line, path):
    if line.endswith(b"\n"):
        try:
            record = json.loads(line)
            if isinstance(record, dict):
                return record
        except ValueError:
            pass
    raise ValueError("`%s` is damaged" % path)


def write_journal(root, journal):
    """Replaces the journal."""
    text = '{"format":%d,"step":"%s","boots":%d' % (FORMAT, journal["step"], journal["boots"])
    if journal.get("keep"):
        text += ',"keep":true'
    if journal.get("reason"):
        text += ',"reason":' + json.dumps(journal["reason"])
    _replace(root, JOURNAL, text + ',"seen":{' + list_text(journal["seen"]) + "}}\n")


def write_seen(root, seen):
    """Replaces the newest list accepted."""
    _replace(root, SEEN, '{"format":%d,%s}\n' % (FORMAT, list_text(seen)))


def list_text(seen):
    """What a record says of a list, as JSON without its braces."""
    parts = []
    for key in ("channel", "epoch", "sequence", "version", "created", "list", "rollout"):
        if seen.get(key) is not None:
            parts.append('"%s":%s' % (key, json.dumps(seen[key])))
    refused = seen.get("refused")
    if refused:
        text = '"refused":{"error":%s,"rolled_back":%s}'
        parts.append(text % (json.dumps(refused["error"]), json.dumps(bool(refused.get("rolled_back")))))
    return ",".join(parts)


def _replace(root, name, text):
    # Written beside it, and renamed.
    beside = root + name + ".new"
    try:
        _with_room(root, _write, beside, text)
    except OSError:
        if kind(beside) == FILE:
            os.remove(beside)
        raise
    _with_room(root, os.rename, beside, root + name)
    sync()


def _with_room(root, act, *args):
    # On a full flash, the reserve makes room.
    try:
        act(*args)
    except OSError as error:
        if error.args[0] != _ENOSPC or kind(root + RESERVE) != FILE:
            raise
        os.remove(root + RESERVE)
        act(*args)


def _write(path, text):
    with open(path, "w") as file:
        file.write(text)
        # littlefs makes a file durable when it is closed; the Unix port when it is flushed.
        file.flush()


# Files.


def staged_name(digest, copy):
    """Where a staged file is, below the root."""
    return STAGING + "/" + digest + ("-%d" % copy if copy else "")


def kind(path):
    """What stands at `path`: NONE, FILE (and all that is no folder) or DIRECTORY."""
    try:
        return DIRECTORY if os.stat(path)[0] & 0x4000 else FILE
    except OSError as error:
        if error.args[0] in (_ENOENT, _ENOTDIR):
            return NONE
        raise


def clear(path):
    """Removes all files of a folder."""
    while True:
        names = []
        for entry in os.ilistdir(path):
            if len(names) < _NAMES:
                names.append(entry[0])
        for name in names:
            os.remove(path + "/" + name)
        if len(names) < _NAMES:
            return


def sync():
    """Makes names durable, where the port can: littlefs does so by itself, VfsPosix has no call for it."""
    if hasattr(os, "sync"):
        os.sync()
