"""Judges an update list: the rules of agent-sim/src/accept.rs, and `judge` of its update.rs.

Who signed it is looked at in `vouch`; whose turn it is, in `turn`; orders are carried out in `orders`: most
devices have no need of them most of the time, and little memory.

Numbers in [] are sections of the specification of TUF, 1.0.33.
"""

import os
import time

from micropython import const

from .agent import Job, tidy
from .refusal import Refused

# A clock that says less was never set.
_YEAR = const(2024)
# What another root may put right.
_BY_ROOT = ("unknown-key", "bad-signature", "expired-root", "wrong-epoch")


async def run(agent):
    if agent.arrived is None:
        # One that came while a release was being confirmed.
        digest, agent.queued = agent.queued, None
        if agent.head.get("list") == digest:
            return "greet"
        from . import arrive

        path = agent.folder + "list.json"
        summary, kind = arrive.read(agent.folder, path), "list"
        del arrive
    else:
        summary, path, digest, kind = agent.arrived
        agent.arrived = None
    tidy()
    seen = None
    try:
        if isinstance(summary, Refused):
            raise summary
        if kind == "cmd":
            for order in summary["orders"]:
                from . import orders

                if await orders.run(agent, order):
                    return "leave"
            # Orders alone are no list: nothing is to be removed because of them.
            if not summary["release"] and not summary["packages"]:
                return "listen"
        if agent.confirming:
            # To be judged when that is over.
            accept(agent, summary, path)
            agent.queued = digest
            return "listen"
        seen = {"channel": agent.channel, "list": digest}
        if summary["release"]:
            for key in ("sequence", "version"):
                seen[key] = summary["release"][key]
        return _judge(agent, summary, seen, path, kind, _vouched(agent, summary["release"], seen, path))
    except Refused as refused:
        if refused.verdict != "reject":
            raise
        if kind == "base":
            agent.tell("nothing to have meanwhile: " + refused.text)
        else:
            _refuse(agent, refused, seen, digest)
        return "listen"


def accept(agent, summary, path):
    """The list is what is read from now on."""
    if not summary["known"]:
        # First what was written down of it: if the list is there, so is that.
        os.rename(agent.folder + "list.next", agent.folder + "list.jsonl")
    if not path.endswith("list.json"):
        os.rename(path, agent.folder + "list.json")


def now(agent):
    """What time it is, as `2026-11-20T10:00:00`; `None` if this device does not know."""
    found = time.gmtime()
    if found[0] < _YEAR:
        ahead = agent.roots[4] if agent.roots else None
        if ahead is None:
            return None
        found = time.gmtime(int(time.time()) + ahead)
    return "%04d-%02d-%02dT%02d:%02d:%02d" % tuple(found[:6])


def _vouched(agent, release, seen, path):
    """Whether somebody signed the list who may. -> what time it is, if that is known"""
    if not agent.keys:
        return now(agent)
    from . import vouch

    try:
        return vouch.check(agent, release, seen, path)
    finally:
        del vouch
        tidy()


def _judge(agent, summary, seen, path, kind, when):
    """Decides about a list: what is to be done next."""
    from .store import Store

    store = Store(agent.root)
    store.load()
    digest = seen["list"]
    release = summary["release"]
    before = store.seen or {}
    check(agent, release, seen, before, kind, when)
    if agent.servers:
        agent.servers[1] = None
    if summary["unfit"]:
        wheel = summary["unfit"]
        text = "wheel `%s` is for `%s`; this device is `%s`"
        raise Refused("no-fit", text % (wheel["name"], wheel.get("tag"), summary["device"]))
    if agent.job and agent.job.seen["list"] == digest:
        return "listen"
    if kind == "base":
        return "listen" if agent.job or "list" in store.head else begin(agent, summary, seen, path)
    agent.abandon()
    if not release and not summary["packages"] and "list" not in store.head:
        # What a channel that nobody published to answers.
        agent.rest()
        return "listen"
    if before.get("list") == digest and "refused" in before:
        seen["refused"] = before["refused"]
    if release and release["more"]:
        agent.arrived = summary, seen, path
        return "turn"
    if agent.order == "install":
        agent.order = None
    return settle(agent, summary, seen, path, store)


def settle(agent, summary, seen, path, store, keep=False):
    """It is this device's turn: is there something to do? `keep`: what it does is never taken back."""
    agent.turn = None
    store.remember(seen)
    if store.head.get("list") == seen["list"] and agent.order != "check":
        # The same list once more, as after the restart, leaves what is told about its download.
        if agent.phase != "idle" or agent.seen.get("list") != seen["list"]:
            agent.rest()
        return "listen"
    if "refused" in seen:
        agent.rest_on_refused(seen)
        return "listen"
    return begin(agent, summary, seen, path, keep)


def begin(agent, summary, seen, path, keep=False):
    """It is to be installed."""
    agent.order = None
    for text in summary["skipped"]:
        agent.tell("skipping " + text)
    accept(agent, summary, path)
    agent.done = 0
    agent.job = Job(seen)
    agent.job.keep = keep
    return "survey"


def check(agent, release, found, seen, kind, when):
    """Whether a list is for this channel, the newest, and not expired by `when`, if that is known."""
    sequence = found.get("sequence")
    if release and release["channel"] != agent.channel:
        text = "this list is for channel `%s`, this device follows `%s`"
        raise Refused("wrong-channel", text % (release["channel"], agent.channel))
    if kind == "base":
        # One of the history, that the newest list names: its age does not matter.
        if sequence != agent.turn["base"]:
            text = "the release in the history as %d is %s"
            raise Refused("wrong-base", text % (agent.turn["base"], sequence))
        return
    highest = seen.get("sequence") if seen.get("channel") == agent.channel else None
    # [5.5.5]. By a new epoch, the sequences of the last one are forgotten: [5.3.11].
    if highest is not None:
        epoch, newest = found.get("epoch", 0), seen.get("epoch", 0)
        if sequence is None:
            raise Refused("rollback", "a list without a sequence follows sequence %d" % highest)
        if epoch < newest:
            text = "epoch %d is older than %d, which this device has seen"
            raise Refused("rollback", text % (epoch, newest))
        if epoch == newest and sequence < highest:
            text = "sequence %d is older than %d, which this device has seen"
            raise Refused("rollback", text % (sequence, highest))
        if epoch == newest and sequence == highest and seen["list"] != found["list"]:
            raise Refused("rollback", "sequence %d was seen before with another content" % sequence)
    # [5.5.6]
    if release and "expires" in release and when and release["expires"][:19] <= when:
        text = "sequence %d expired at %s, it is %sZ"
        raise Refused("expired", text % (sequence, release["expires"], when))


def _refuse(agent, refused, seen, digest):
    if agent.servers and " is older than " in refused.text:
        from . import places

        return places.behind(agent, refused)
    agent.tell("a list is refused: " + refused.text)
    if agent.roots and agent.roots[2] and refused.word in _BY_ROOT:
        # It comes once more, behind a root that may be what it needs.
        return
    if agent.job and agent.job.seen["list"] == digest:
        # A new root took away the right to sign what is being fetched.
        agent.abandon()
    # It changes nothing: what is under way goes on, and is what the state is about.
    if not agent.job and not agent.confirming:
        agent.show("failed", seen or {"list": digest})
        agent.fail(refused)
