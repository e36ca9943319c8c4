"""The device starts: what its flash says."""

import time

from .store import Store


async def run(agent):
    store = Store(agent.root)
    found, seen = store.boot()
    agent.root = store.root
    agent.folder = store.root + "/.mpypi/"
    agent.head = store.head
    if found == "restart":
        agent.restarting = True
        return "leave"
    if found == "confirming":
        agent.show("confirming", seen)
        agent.confirming = True
        if agent.confirm_after is not None:
            agent.confirm_at = time.ticks_add(time.ticks_ms(), agent.confirm_after)
    elif seen and seen.get("refused", {}).get("rolled_back"):
        agent.rest_on_refused(seen)
    else:
        agent.rest()
    if isinstance(agent.keys, str):
        with open(agent.keys, "rb") as file:
            if file.read(1) == b"[":
                # Not plain keys, but a root that says whose they are.
                return "pin"
    return "dial"
