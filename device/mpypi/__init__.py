"""mpypi: keeps a MicroPython device at the release that its channel has.

    import mpypi
    mpypi.run(server="mqtt://broker", channel="dev")

does nothing else, for ever. Beside an application's own coroutines:

    agent = mpypi.Agent(server="mqtts://broker", channel="dev", ca="/ca.der")
    asyncio.create_task(agent.run())

or, where the application says when, `await agent.check()`. `mpypi.confirm()` says that a new release works.

Importing this imports nothing: boot.py must fit where nothing else does.
"""

__version__ = "0.1.0"


def Agent(*arguments, **options):
    """An agent for asyncio; see `agent.Agent`."""
    from . import agent

    return agent.Agent(*arguments, **options)


def run(*arguments, **options):
    """Runs an agent without asyncio, and without an end. Takes what `agent.Agent` takes."""
    from . import agent, blocking

    return blocking.drive(agent.Agent(*arguments, nap=blocking.nap, **options).run())


def check(*arguments, **options):
    """Looks at the channel once, without asyncio, and says how it went: see `agent.Agent.check`."""
    from . import agent, blocking

    return blocking.drive(agent.Agent(*arguments, nap=blocking.nap, **options).check())


def confirm(root=""):
    """The application says that the new release works: it is kept."""
    import sys

    module = sys.modules.get("mpypi.agent")
    if module and module.running:
        module.running.confirm()
    else:
        from . import boot

        boot.confirm(root)
