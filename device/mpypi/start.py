"""The device starts: what its flash says."""

import time

from .store import Store


async def run(agent):
    store = Store(agent.root)
    kind, seen = store.boot()
    agent.root = store.root
    agent.folder = store.root + "/.mpypi/"
    agent.head = store.head
    if kind == "restart":
        agent.restarting = True
        return "leave"
    if kind == "confirming":
        agent.show("confirming", seen)
        agent.confirming = True
        if agent.confirm_after is not None:
            agent.confirm_at = time.ticks_add(time.ticks_ms(), agent.confirm_after)
    elif seen and seen.get("refused", {}).get("rolled_back"):
        agent.rest_on_refused(seen)
    else:
        agent.rest()
    return "dial"
