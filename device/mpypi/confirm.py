"""The new release works: it is kept. Then, a list that came meanwhile is looked at."""

from .refusal import Refused
from .store import Store


async def run(agent):
    store = Store(agent.root)
    agent.confirming = agent.confirmed = False
    agent.confirm_at = None
    try:
        store.confirm()
    except (OSError, MemoryError, Refused) as error:
        agent.tell("cannot confirm: %s; restarting" % agent.refusal(error).text)
        agent.restarting = True
        return "leave"
    agent.head = store.head
    agent.rest(True)
    if not agent.line:
        return None
    if agent.queued:
        # People see that the last one arrived before the next one starts.
        await agent.report()
        return "judge"
    return "greet"
