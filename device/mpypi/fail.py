"""The release cannot be applied now: tries again later, or does not."""

import time

from . import limits
from .agent import pause
from .refusal import Lost, Refused


async def run(agent):
    refused, job, line = agent.refused, agent.job, agent.line
    agent.refused = None
    if line:
        await line.skip()
    if line and not agent.since:
        # It did not even come to ask for anything.
        raise Lost(refused.text)
    if not job:
        agent.tell(refused.text)
        if not agent.confirming:
            agent.fail(refused)
        return _next(agent)
    topics = list(job.open)
    job.stop()
    verdict = refused.verdict
    tries = limits.ATTEMPTS if verdict == "retry" else limits.FETCHES if verdict == "refetch" else 0
    if job.tries < tries:
        wait = pause(job.tries - 1, limits.RETRY_FIRST, limits.RETRY_MOST)
        agent.show("downloading", job.seen)
        text = "%s; try %d of %d follows in %d ms"
        agent.tell(text % (refused.text, job.tries + 1, tries, wait))
        job.again_at = time.ticks_add(time.ticks_ms(), wait) or 1
    else:
        agent.tell(refused.text)
        agent.abandon()
        agent.fail(refused)
        _remember(agent, refused, job)
    if topics and line:
        await line.unsubscribe(topics)
    return _next(agent)


def _next(agent):
    return "listen" if agent.line else "dial"


def _remember(agent, refused, job):
    from .store import Store

    try:
        store = Store(agent.root)
        store.load()
        if refused.verdict == "reject":
            # What a device takes while it waits for its turn is not what it saw last.
            if store.seen and store.seen["list"] == job.seen["list"]:
                store.refuse(refused.text)
            else:
                store.discard()
        elif refused.word == "no-space":
            # What was fetched would stay for the next try; here the application needs the room.
            store.discard()
    except (OSError, Refused) as error:
        agent.tell(agent.refusal(error).text)
