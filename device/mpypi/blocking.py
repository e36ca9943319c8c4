"""Runs the agent's coroutines without asyncio: what they wait for never yields."""

import time


async def nap(ms):
    """Waits without giving way: what makes the coroutines of this module block."""
    time.sleep_ms(ms)


def drive(task):
    """Runs a coroutine that never yields, and returns what it returns."""
    try:
        while True:
            task.send(None)
    except StopIteration as end:
        return end.value
