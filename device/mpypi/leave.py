"""Says goodbye; restarts the device if that is why."""

from .mqtt import Lost


async def run(agent):
    line = agent.line
    if line.socket:
        try:
            await agent.report()
        except Lost:
            pass
        await line.leave(agent.topics[1] + "online")
    if not agent.restarting:
        return None
    if agent.restart:
        agent.restart()
        return None
    from . import boot

    boot.restart()
