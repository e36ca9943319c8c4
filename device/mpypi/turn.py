"""Whether it is this device's turn to take a release, and what it does until then."""

import time

from . import limits
from .agent import tidy
from .refusal import Refused


async def run(agent):
    """A list is believed that says who is to take it, or that a release is bad."""
    summary, seen, path = agent.arrived
    agent.arrived = None
    # One after the other in memory: what it says, what that means, what is kept of it.
    found = _read(agent, seen, path)
    tidy()
    head = agent.head
    # What runs is bad: it is left at once, and never gone back to.
    bad = (
        head.get("sequence") in found.get("revoked", ())
        and head.get("channel") == agent.channel
        and head.get("epoch", 0) == seen.get("epoch", 0)
    )
    held = None
    if "rollout" in found:
        ordered = agent.order == "install"
        if ordered:
            agent.order = None
        held = _why(agent, found["rollout"], seen, head, ordered)
        tidy()
    from . import judge
    from .store import Store

    store = Store(agent.root)
    store.load()
    before = store.seen or {}
    if "refused" in before and "rollout" in seen and before.get("rollout") == seen["rollout"]:
        # All lists of one rollout have the same packages.
        seen["refused"] = before["refused"]
    if bad or not held or "refused" in seen or head.get("list") == seen["list"]:
        return judge.settle(agent, summary, seen, path, store, bad)
    agent.order = None
    judge.accept(agent, summary, path)
    store.remember(seen)
    await _hold(agent, seen, held)
    return "listen"


def _read(agent, seen, path):
    from . import nested

    try:
        return nested.release(path)
    except Refused:
        agent.show("failed", seen)
        raise


def _why(agent, found, seen, head, ordered):
    """Why a release has to wait: a text, in how many seconds to look again, and the sequence of what a device with
    nothing installed takes meanwhile (or `None`). `None` if it is this device's turn."""
    from . import clock, judge, rollout

    try:
        plan = rollout.read(found)
    except ValueError as error:
        return Refused("bad-rollout", str(error)).text, limits.CHECK // 1000, None
    seen["rollout"] = plan["id"]
    # Whoever runs a release of the same rollout is in, also if the query does not hold for what it has become.
    if head.get("rollout") == plan["id"]:
        return None
    if not rollout.admits(plan, agent.node, lambda field: _fact(agent, field)):
        return "it is not its turn", limits.CHECK // 1000, plan["base"]
    if ordered:
        # No need to wait for the time of day, or for others.
        plan["window"], plan["jitter"] = None, 0
    elif plan["optional"]:
        return "it waits for an order", limits.CHECK // 1000, plan["base"]
    now = judge.now(agent)
    since = 0
    if agent.turn and agent.turn["list"] == seen["list"]:
        since = max(0, int(time.time()) - agent.turn["since"])
    wait = rollout.wait(plan, agent.node, since, now and clock.seconds(now), agent.utc_offset or 0)
    return ("it starts in %d s" % wait, wait, plan["base"]) if wait else None


async def _hold(agent, seen, held):
    """Keeps what runs."""
    why, wait, base = held
    turn = {"list": seen["list"], "sequence": seen["sequence"], "since": int(time.time()), "base": base}
    if agent.turn and agent.turn["list"] == seen["list"]:
        turn["since"] = agent.turn["since"]
    else:
        agent.tell("sequence %d is held: %s" % (seen["sequence"], why))
    turn["look"] = time.ticks_add(time.ticks_ms(), min(1000 * wait, limits.CHECK))
    agent.rest()
    if why.startswith("bad-rollout: "):
        agent.error = why
    agent.turn = turn
    if base is not None and "list" not in agent.head:
        turn["topic"] = "mpypi/channels/%s/history/%d" % (agent.channel, base)
        await agent.ask([turn["topic"]])


def _fact(agent, field):
    """What this device says of itself."""
    head = agent.head
    if field == "sequence":
        return str(head[field]) if field in head else None
    if field == "runtime":
        from . import tags

        return tags.best()
    if field == "agent":
        from . import __version__

        return "mpypi/" + __version__
    if field == "firmware":
        import sys

        return sys.version
    if field.startswith("label."):
        return (agent.labels or {}).get(field[6:])
    return {"node": agent.node, "channel": agent.channel, "version": head.get("version")}[field]
