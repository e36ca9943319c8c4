"""Puts the release under way in place."""

from . import boot, limits
from .boot import FILE, INSTALLED, JOURNAL, NONE, OLD, PLAN, RESERVE, header, kind, lines
from .files import copy, write
from .refusal import Refused


async def run(agent):
    agent.phase = "installing"
    await agent.try_report()
    try:
        done = commit(agent.root, agent.job.seen, agent.changes)
    except (OSError, MemoryError, ValueError, Refused) as error:
        refused = agent.refusal(error)
        agent.tell(refused.text + "; looking what became of it")
        if boot.start(agent.root)[0] == "rest":
            raise refused
        done = "restart"
    agent.abandon()
    if done == "restart":
        agent.phase = "restarting"
        agent.restarting = True
        return "leave"
    agent.head = header(agent.root + INSTALLED)
    agent.rest(True)
    return "greet" if agent.line else "dial"


def commit(root, seen, changes):
    """Puts what `stage` prepared in place. -> "unchanged", or "restart": restart the device"""
    if kind(root + JOURNAL) != NONE:
        raise Refused("bug", "a release is committed while another is being confirmed")
    if not changes:
        boot.finish(root, seen)
        return "unchanged"
    journal = {"step": "install", "boots": 0, "seen": seen}
    try:
        boot.clear(root + OLD)
        _keep_code(root)
        filling = b"-" * 256
        with open(root + RESERVE, "wb") as file:
            for _ in range(limits.RESERVE // len(filling)):
                write(file, filling)
            file.flush()
        boot.sync()
        boot.write_journal(root, journal)
    except OSError:
        if kind(root + JOURNAL) == NONE:
            # They take up room that may be what is missing.
            boot.tidy(root)
        raise
    boot.redo(root)
    journal["step"] = "confirm"
    boot.write_journal(root, journal)
    return "restart"


def _keep_code(root):
    # Code is replaced by one rename: a power cut must not leave a device without its boot.py, or without
    # the module that would go on with the journal. So its old file is kept as a copy, before the commit.
    number = 0
    for line in lines(root + PLAN):
        if "folder" in line:
            continue
        if "put" in line and line["put"].endswith((".py", ".mpy")):
            path = root + "/" + line["put"]
            if kind(path) == FILE:
                copy(path, root + OLD + "/%d" % number)
        number += 1
