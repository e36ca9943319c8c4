"""Whom this device believes to begin with: the newest root that it kept, or the one that it pins."""

from . import keys, roots
from .files import sync
from .refusal import Refused


async def run(agent):
    # Without a root that can be read, the device does not even start.
    folder, agent.folder = agent.folder, None
    path = agent.root + keys.ROOT
    kept = pinned = 0
    try:
        kept = roots.version(path)
    except (OSError, Refused):
        pass  # There is none yet, or the flash lost it.
    try:
        pinned = roots.version(agent.keys)
        if pinned > kept:
            roots.check(agent.keys)
            _copy(agent.keys, path)
    except (OSError, Refused):
        if not kept:
            raise
    newest = max(kept, pinned)
    # The version of the newest root; the topic where the next one would be; how often the list was asked for and did
    # not come yet; the nonce of the question for the time; the seconds that the clock is behind the answer.
    agent.roots = [newest, roots.topic(newest), 0, None, None]
    agent.folder = folder
    return "dial"


def _copy(source, target):
    from .records import copy

    copy(source, target)
    sync()
