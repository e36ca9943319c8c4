"""Whether somebody signed a list who may: the rules of protocol/src/signed.rs.

Numbers in [] are sections of the specification of TUF, 1.0.33.
"""

import json

from . import judge, rsa
from .refusal import Refused


def check(agent, release, found, path):
    """Raises `Refused` unless the list in the file `path` is signed by whom this device believes. `found`, what is to
    be remembered of it, gets its epoch, and the time that it makes certain.

    -> what time it is: the clock's, or that of the newest list verified before, whichever is later: a device without
       a clock is not kept in the past. `None` if nobody knows.
    """
    keys, epoch = agent.keys, release.get("epoch", 0) if release else 0
    wanted = epoch
    if agent.roots:
        from .keys import ROOT, Signers

        keys = Signers(agent.root + ROOT, agent.channel)
        wanted = keys.epoch
    elif isinstance(keys, str):
        with open(keys) as file:
            keys = json.load(file)
    time = judge.now(agent)
    # [5.3.11]: the times of an earlier epoch are forgotten; they were perhaps a thief's.
    floor = _floor(agent, wanted)
    if floor and (not time or floor[:19] > time):
        time = floor[:19]
    if agent.roots:
        keys.check_expiry(time)
    rsa.check(path, keys)
    if agent.roots and not release:
        raise Refused("bad-list", "without a `release`, it could be for any channel")
    if agent.roots and release["channel"] == agent.channel and epoch != wanted:
        raise Refused("wrong-epoch", "this list is of epoch %d, the root says %d" % (epoch, wanted))
    if epoch:
        found["epoch"] = epoch
    made = release.get("created", "") if release else ""
    if made or floor:
        found["created"] = made if made[:19] > floor[:19] else floor
    return time


def _floor(agent, epoch):
    """When the newest list of the channel was made, as far as that was verified in this epoch."""
    try:
        with open(agent.folder + "seen.json") as file:
            seen = json.load(file)
    except OSError:
        return ""
    if seen.get("channel") != agent.channel or seen.get("epoch", 0) != epoch:
        return ""
    return seen.get("created", "")
