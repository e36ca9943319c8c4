"""One device that meets a hostile broker again and again. Its one argument is a file of JSON: `server`,
`root`, `times`,
`limits`. Says how each connection ended.
"""

import json
import sys

with open(sys.argv[1]) as file:
    options = json.load(file)

from mpypi import agent, blocking, limits

for name, value in options["limits"].items():
    setattr(limits, name, value)


class Restarted(Exception):
    pass


def restart():
    raise Restarted


def make():
    server, root = options["server"], options["root"]
    return agent.Agent(server, "dev", node="board", root=root, restart=restart, log=None, nap=blocking.nap)


node = make()
for _ in range(options["times"]):
    try:
        phase = blocking.drive(node.check())
        print(json.dumps(phase + ": " + (node.error or "")))
    except agent.Lost as lost:
        print(json.dumps(lost.args[0]))
    except Restarted:
        print(json.dumps("restarting"))
        node = make()
    # Each is the first.
    node.job = None
    node.phase = "idle"
