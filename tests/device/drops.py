"""Many devices, one after the other, each on a line that breaks again and again. Its one argument is a file
of JSON:
`server`, `root`, `first` and `last` (the seeds), `limits`. Says for each what it took; ends at the first that
stops.
"""

import json
import os
import random
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


for seed in range(options["first"], options["last"]):
    random.seed(seed)
    root = "%s/%d" % (options["root"], seed)
    os.mkdir(root)
    losses = starts = 0
    while True:
        # Retries of its own, as `run` has them, but an end where there is nothing more to do.
        node = agent.Agent(
            options["server"],
            "dev",
            node="board-%d" % seed,
            root=root,
            confirm_after=0,
            restart=restart,
            log=None,
            nap=blocking.nap,
        )
        phase = "lost"
        while phase == "lost" or phase == "failed":
            try:
                phase = blocking.drive(node.check())
            except Restarted:
                phase = "restarting"
                agent.running = None
                starts += 1
            except agent.Lost:
                phase = "lost"
                losses += 1
            if losses > 500:
                print("seed %d does not converge" % seed)
                sys.exit(1)
        if phase != "restarting":
            break
    print(json.dumps({"seed": seed, "phase": phase, "losses": losses, "starts": starts}))
