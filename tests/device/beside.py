"""An application of its own in asyncio, with an agent beside it. Its one argument is a file of JSON: what
`Agent` takes. Says how often the application had its turn, and when.
"""

import asyncio
import json
import sys

with open(sys.argv[1]) as file:
    options = json.load(file)

import mpypi


class Restarted(Exception):
    pass


def restart():
    raise Restarted


turns = {"downloading": 0}
agent = mpypi.Agent(restart=restart, log=None, **options)


async def application():
    while True:
        turns[agent.phase] = turns.get(agent.phase, 0) + 1
        await asyncio.sleep_ms(1)


async def main():
    task = asyncio.create_task(application())
    try:
        phase = await agent.check()
    except Restarted:
        phase = "restarting"
    task.cancel()
    return phase


print(json.dumps({"phase": asyncio.run(main()), "turns": turns}))
