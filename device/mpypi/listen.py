"""Waits for what the broker sends, and fetches packages."""

import time

from . import limits
from .files import topic
from .mqtt import PUBLISH, SUBACK
from .refusal import Lost, Refused, missing_package


async def run(agent):
    line = agent.line
    while True:
        if agent.is_due():
            return "confirm"
        job = agent.job
        if job:
            now = time.ticks_ms()
            if job.again_at is not None:
                if time.ticks_diff(job.again_at, now) <= 0:
                    job.again_at = None
                    job.tries += 1
                    return "survey"
            elif not await _fetch(agent, job, now):
                return "gather"
        while agent.lines:
            await line.publish(agent.topics[1] + "log", agent.lines.pop(0).encode(), False, 0)
        await agent.report()
        if agent.once and not job:
            # A root that comes may change what is believed of a list that came.
            more = agent.roots and (agent.roots[2] or agent.asked)
            more = more or agent.turn and "topic" in agent.turn
            if agent.confirming or agent.listed and not more:
                return "leave"
            if time.ticks_diff(time.ticks_ms(), agent.since) > limits.FETCH_STALL:
                if agent.listed:
                    return "leave"
                raise line.lost("channel `%s` has no list" % agent.channel)
        if time.ticks_diff(agent.check_at, time.ticks_ms()) <= 0:
            agent.check_later()
            await agent.ask_for_list()
        if agent.servers:
            from . import places

            places.look(agent)
        if agent.turn and time.ticks_diff(agent.turn["look"], time.ticks_ms()) <= 0:
            agent.turn["look"] = time.ticks_add(time.ticks_ms(), limits.CHECK)
            await agent.ask_for_list()
        kind = await line.next(_time_to_wait(agent))
        if kind == SUBACK:
            _granted(agent)
        elif kind == PUBLISH:
            topic = line.topic
            kind = _kind(agent, topic)
            if kind in ("roots", "told"):
                return kind
            if kind:
                if line.left:
                    agent.arrived = kind
                    return "arrive"
                agent.tell("there is no list any more; nothing changes")
            elif job and topic in job.open and line.left:
                await _take(agent, job, topic)
            else:
                await line.skip()


def _kind(agent, topic):
    """What kind of list a message is, or which phase takes it in, by its topic."""
    roots, turn = agent.roots, agent.turn
    if topic == agent.topics[0]:
        agent.listed = True
        if roots and roots[2] and agent.line.retained:
            roots[2] -= 1
        return "list"
    if topic == agent.topics[1] + "cmd":
        # A retained order would be carried out again after every reconnect.
        return None if agent.line.retained else "cmd"
    if turn and topic == turn.get("topic"):
        del turn["topic"]
        return "base"
    if roots and agent.line.left:
        if topic == roots[1]:
            return "roots"
        if roots[3] and topic == agent.topics[1] + "time":
            return "told"
    return None


def _time_to_wait(agent):
    """How long nothing needs to be done."""
    now = time.ticks_ms()
    job = agent.job
    wait = limits.LOOK
    look = agent.turn and agent.turn["look"]
    for at in (job and (job.again_at or job.stall_at), agent.confirm_at, look):
        if at:
            wait = min(wait, max(0, time.ticks_diff(at, now)))
    return wait


def _granted(agent):
    answer = agent.line.answer
    for code, topic in zip(answer[2:], agent.asked.pop(answer[0] << 8 | answer[1], ())):
        if code > 2:
            refused = Refused("not-allowed", "the broker refused the subscription to `%s`" % topic)
            if agent.job and topic in agent.job.open:
                raise refused
            agent.tell("error: " + refused.text)
            if not agent.job and not agent.confirming:
                agent.fail(refused)


def _needs(entries, needs):
    number = 0
    for entry in entries:
        if needs[number >> 3] & 1 << (number & 7):
            yield entry
        number += 1


async def _fetch(agent, job, now):
    """Asks for packages up to the window, for one of those in chunks at a time; says whether any are still awaited."""
    topics = []
    if job.needs is not None:
        job.cursor = _needs(agent.entries(), job.needs)
        job.needs = None
    while job.cursor and not job.chunks and len(job.open) < limits.WINDOW:
        found = next(job.cursor, None)
        if not found:
            job.cursor = None
        elif "chunks" in found:
            from . import chunks

            await chunks.look(agent, found)
        else:
            topics.append(topic(found))
            job.open[topics[-1]] = found
    if job.chunks:
        from . import chunks

        found = chunks.topic(job)
        if found not in job.open:
            topics.append(found)
            job.open[found] = job.chunks[0]
    if topics:
        job.stall_at = time.ticks_add(now, limits.FETCH_STALL)
        await agent.ask(topics)
    elif job.open and time.ticks_diff(job.stall_at, now) <= 0:
        raise missing_package(min(job.open))
    return len(job.open) > 0


async def _take(agent, job, topic):
    line = agent.line
    entry = job.open[topic]
    before = agent.done, agent.total
    if "chunks" in entry:
        from . import chunks

        incoming = await chunks.begin(agent, topic)
        if not incoming:
            await line.skip()
            del job.open[topic]
            await line.unsubscribe([topic])
            return
    else:
        from .incoming import Incoming

        incoming = Incoming(agent.root, entry)
    try:
        while True:
            piece = await line.piece()
            if not piece:
                break
            incoming.write(piece)
            agent.done += len(piece)
            if entry.get("size") is None:
                agent.total += len(piece)
            await agent.report()
        incoming.finish()
    except Refused:
        raise
    except (Lost, OSError, MemoryError):
        agent.done, agent.total = before
        incoming.abort()
        raise
    job.losses = 0
    del job.open[topic]
    job.stall_at = time.ticks_add(time.ticks_ms(), limits.FETCH_STALL)
    await line.unsubscribe([topic])
    if "chunks" in entry and job.chunks[1] == entry["chunks"][1]:
        # That was the last one.
        await chunks.look(agent, entry)
