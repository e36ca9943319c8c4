"""Puts the release under way in place."""

# All that is needed until the restart: if the agent is part of the release, what is imported later is
# another's.
from . import boot, leave, limits
from .boot import FILE, INSTALLED, JOURNAL, NONE, OLD, PLAN, RESERVE, header, kind, lines
from .files import write
from .records import copy
from .refusal import Refused


async def run(agent):
    agent.phase = "installing"
    await agent.try_report()
    try:
        done = commit(agent.root, agent.job.seen, agent.changes, agent.job.keep)
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
        return await leave.run(agent)
    agent.head = header(agent.root + INSTALLED)
    agent.rest(True)
    return "greet" if agent.line else "dial"


def commit(root, seen, changes, keep=False):
    """Puts what `stage` prepared in place. `keep`: what it replaces is revoked, and never gone back to.

    -> "unchanged", or "restart": restart the device
    """
    if kind(root + JOURNAL) != NONE:
        raise Refused("bug", "a release is committed while another is being confirmed")
    if not changes:
        boot.finish(root, seen)
        return "unchanged"
    journal = {"step": "install", "boots": 0, "keep": keep, "seen": seen}
    try:
        boot.clear(root + OLD)
        _keep_copies(root)
        filling = b"-" * 256
        with open(root + RESERVE, "wb") as file:
            for _ in range(limits.RESERVE // len(filling)):
                write(file, filling)
            file.flush()
        boot.make_folders(root)
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


def _keep_copies(root):
    # Before the commit, a copy is kept of the old files whose folders a start needs. They are then replaced
    # by one rename, and a power cut does not leave a device without its boot.py, or without the module that
    # goes on with the journal. Nor is anything moved out of their folders: littlefs, cut in the middle of
    # that, hides the neighbour of what was moved.
    number = 0
    for line in lines(root + PLAN):
        if "folder" in line:
            continue
        name = line["put"] if "put" in line else line["remove"]
        if needed_to_start(name) and kind(root + "/" + name) == FILE:
            copy(root + "/" + name, root + OLD + "/%d" % number)
        number += 1


def needed_to_start(path):
    """Whether a file is code, or lies beside what a start needs: boot.py, lib/, lib/mpypi/."""
    folder = path.rpartition("/")[0]
    return path.endswith((".py", ".mpy")) or folder in ("", "lib", "lib/mpypi")
