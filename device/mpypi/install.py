"""Everything is there: unpacks it, and puts it in place."""

from .mqtt import Lost
from .refusal import Refused
from .store import Store


async def run(agent):
    store = Store(agent.root)
    agent.phase = "verifying"
    await _report(agent)
    store.stage(agent.job.seen, agent.entries)
    agent.phase = "installing"
    await _report(agent)
    try:
        done = store.commit()
    except (OSError, MemoryError, Refused) as error:
        refused = agent.refusal(error)
        agent.tell(refused.text + "; looking what became of it")
        if store.boot()[0] == "rest":
            raise refused
        done = "restart"
    agent.abandon()
    if done == "restart":
        agent.phase = "restarting"
        agent.restarting = True
        return "leave"
    agent.head = store.head
    agent.rest(True)
    return "greet" if agent.line.socket else "dial"


async def _report(agent):
    try:
        await agent.report()
    except Lost:
        pass  # It needs no connection.
