"""Says goodbye; restarts the device if that is why."""


async def run(agent):
    await agent.try_report()
    if agent.line:
        await agent.line.leave(agent.topics[1] + "online")
        agent.hang_up()
    if not agent.restarting:
        return None
    if agent.restart:
        agent.restart()
        return None
    from . import boot

    boot.restart()
