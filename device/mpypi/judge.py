"""Judges an update list: the rules of agent-sim/src/accept.rs, and `judge` of its update.rs."""

import json
import os
import time

from micropython import const

from .agent import Job, tidy
from .refusal import Refused

# A clock that says less was never set.
_YEAR = const(2024)


async def run(agent):
    if agent.arrived is None:
        # One that came while a release was being confirmed.
        digest, agent.queued = agent.queued, None
        if agent.head.get("list") == digest:
            return "greet"
        from . import arrive

        path = agent.folder + "list.json"
        summary, is_cmd = arrive.read(agent.folder, path), False
        del arrive
    else:
        summary, path, digest, is_cmd = agent.arrived
        agent.arrived = None
    tidy()
    seen = None
    try:
        if isinstance(summary, Refused):
            raise summary
        if is_cmd:
            for order in summary["orders"]:
                if await _order(agent, order):
                    return "leave"
            # Orders alone are no list: nothing is to be removed because of them.
            if not summary["release"] and not summary["packages"]:
                return "listen"
        if agent.confirming:
            # To be judged when that is over.
            _accept(agent, summary, path)
            agent.queued = digest
            return "listen"
        seen = {"channel": agent.channel, "list": digest}
        if summary["release"]:
            for key in ("sequence", "version"):
                seen[key] = summary["release"][key]
        if agent.keys:
            _check_signature(agent, path)
        return _judge(agent, summary, seen, path)
    except Refused as refused:
        if refused.verdict != "reject":
            raise
        _refuse(agent, refused, seen, digest)
        return "listen"


def _accept(agent, summary, path):
    if not summary["known"]:
        # First what was written down of it: if the list is there, so is that.
        os.rename(agent.folder + "list.next", agent.folder + "list.jsonl")
    if not path.endswith("list.json"):
        os.rename(path, agent.folder + "list.json")


def _check_signature(agent, path):
    from . import rsa

    try:
        keys = agent.keys
        if isinstance(keys, str):
            with open(keys) as file:
                keys = json.load(file)
        rsa.check(path, keys)
    finally:
        del rsa
        tidy()


async def _order(agent, order):
    """Carries an order out; says whether the device restarts for it."""
    if order == "check":
        store = _store(agent)
        agent.recheck = True
        agent.tried = (None, 0)
        store.forgive()
        await agent.line.subscribe(agent.topics[:1])
    elif order == "rollback":
        if agent.confirming:
            _store(agent).give_up("told-to: an operator rolled this release back")
            agent.restarting = True
        else:
            agent.tell("nothing to roll back: no release waits for confirmation")
    elif agent.job:
        agent.tell("not restarting: an update is under way and will")
    else:
        agent.restarting = True
    return agent.restarting


def _store(agent):
    from .store import Store

    store = Store(agent.root)
    store.load()
    return store


def _judge(agent, summary, seen, path):
    """Decides about a list: what is to be done next."""
    store = _store(agent)
    before = store.seen or {}
    _check(agent, summary, seen, before)
    digest = seen["list"]
    if agent.job and agent.job.seen["list"] == digest:
        return "listen"
    agent.abandon()
    if not summary["release"] and not summary["packages"] and "list" not in store.head:
        # What a channel that nobody published to answers.
        agent.rest()
        return "listen"
    if before.get("list") == digest and "refused" in before:
        seen["refused"] = before["refused"]
    if store.head.get("list") == digest and not agent.recheck:
        store.remember(seen)
        # The same list once more, as after the restart, leaves what is told about its download.
        if agent.phase != "idle" or agent.seen.get("list") != digest:
            agent.rest()
        return "listen"
    if "refused" in seen:
        agent.rest_on_refused(seen)
        return "listen"
    agent.recheck = False
    for text in summary["skipped"]:
        agent.tell("skipping " + text)
    _accept(agent, summary, path)
    store.remember(seen)
    agent.done = 0
    agent.job = Job(seen)
    return "survey"


def _check(agent, summary, found, seen):
    """Whether to believe a list."""
    highest = seen.get("sequence") if seen.get("channel") == agent.channel else None
    release = summary["release"]
    sequence = found.get("sequence")
    if release and release["channel"] != agent.channel:
        text = "this list is for channel `%s`, this device follows `%s`"
        raise Refused("wrong-channel", text % (release["channel"], agent.channel))
    if highest is not None:
        if sequence is None:
            raise Refused("rollback", "a list without a sequence follows sequence %d" % highest)
        if sequence < highest:
            text = "sequence %d is older than %d, which this device has seen"
            raise Refused("rollback", text % (sequence, highest))
        if sequence == highest and seen["list"] != found["list"]:
            raise Refused("rollback", "sequence %d was seen before with another content" % sequence)
    now = time.gmtime()
    if release and "expires" in release and now[0] >= _YEAR:
        now = "%04d-%02d-%02dT%02d:%02d:%02d" % tuple(now[:6])
        if release["expires"][:19] <= now:
            text = "sequence %d expired at %s, it is %sZ"
            raise Refused("expired", text % (sequence, release["expires"], now))
    if summary["unfit"]:
        wheel = summary["unfit"]
        text = "wheel `%s` is for `%s`; this device is `%s`"
        raise Refused("no-fit", text % (wheel["name"], wheel.get("tag"), summary["device"]))


def _refuse(agent, refused, seen, digest):
    agent.tell("a list is refused: " + refused.text)
    # It changes nothing: what is under way goes on, and is what the state is about.
    if not agent.job and not agent.confirming:
        agent.show("failed", seen or {"list": digest})
        agent.fail(refused)
