"""What an operator sends to one device beside lists."""

from .store import Store


async def run(agent, order):
    """Carries an order out; says whether the device restarts for it."""
    store = Store(agent.root)
    store.load()
    if order in ("check", "install"):
        agent.order = order
        if order == "check":
            agent.tried = (None, 0)
            store.forgive()
        await agent.ask_for_list()
    elif order == "rollback":
        if not agent.confirming:
            agent.tell("nothing to roll back: no release waits for confirmation")
        elif store.give_up("told-to: an operator rolled this release back"):
            agent.restarting = True
        else:
            agent.tell("not rolling back: the release before is revoked")
    elif agent.job:
        agent.tell("not restarting: an update is under way and will")
    else:
        agent.restarting = True
    return agent.restarting
