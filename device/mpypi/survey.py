"""Works out what must be fetched for the release under way."""

import time

from . import limits
from .store import Store, topic


async def run(agent):
    job = agent.job
    digest = job.seen["list"]
    tried, tries = agent.tried
    agent.tried = (digest, tries + 1 if tried == digest else 1)
    agent.show("downloading", job.seen)
    agent.attempt = agent.tried[1]
    agent.total = agent.done
    job.stop()
    needs, total = Store(agent.root).survey(agent.entries)
    agent.total += total
    job.cursor = _needed(agent.entries(), needs)
    job.stall_at = time.ticks_add(time.ticks_ms(), limits.FETCH_STALL)
    return "listen"


def _needed(entries, needs):
    number = 0
    for entry in entries:
        if needs[number >> 3] & 1 << (number & 7):
            yield topic(entry), entry
        number += 1
