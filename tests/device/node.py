"""Runs one device. Its one argument is a file of JSON: what `Agent` takes, and

`how`: `check` once; `run`; `follow`: check until there is nothing more to do, restarts and all, in one
process
`limits`: limits to be other than usual
`heap`: measure what the agent takes
`clockless`: the device has no clock that was ever set
`boot`: begin as a user's boot.py does
"""

import gc
import json
import sys

with open(sys.argv[1]) as file:
    options = json.load(file)
how = options.pop("how", "check")
times = options.pop("limits", {})
heap = options.pop("heap", False)
clockless = options.pop("clockless", False)

if options.pop("boot", False):
    # As in a user's boot.py.
    from mpypi import boot

    boot.run(options["root"])

import mpypi
from mpypi import agent, blocking, limits

for name in times:
    setattr(limits, name, times[name])


if clockless:
    # As a chip that counts from 2000 on since it was switched on.
    import time

    from mpypi import greet, judge

    class Time:
        def __getattr__(self, name):
            return getattr(time, name)

        def gmtime(self, seconds=None):
            return time.gmtime(946684800 + time.ticks_ms() // 1000 if seconds is None else seconds)

        def time(self):
            return 946684800 + time.ticks_ms() // 1000

    greet.time = judge.time = Time()


class Restarted(Exception):
    pass


def restart():
    raise Restarted


def say(**what):
    print(json.dumps(what))


def log(text):
    say(log=text)


if heap:
    # What is alive is looked at in every phase, whenever a module has come in, and whenever a piece of a
    # package has been taken.
    import builtins

    import_module = builtins.__import__
    state = {"peak": 0, "at": None, "start": None}

    def look(at):
        gc.collect()
        used = gc.mem_alloc()
        if state["start"] is not None and used > state["peak"]:
            state["peak"], state["at"] = used, at

    def watched(name, *more):
        module = import_module(name, *more)
        look(name)
        return module

    builtins.__import__ = watched


def make():
    return agent.Agent(restart=restart, log=log, nap=blocking.nap, **options)


phase = "restarting"
starts = 0
while phase == "restarting":
    starts += 1
    node = make()
    if heap and state["start"] is None:
        gc.collect()
        state["start"] = gc.mem_alloc()
        report = node.report

        async def watched_report():
            look("report")
            await report()

        node.report = watched_report
    try:
        node_error = None
        phase = blocking.drive(node.run() if how == "run" else node.check())
    except Restarted:
        phase = "restarting"
        node.hang_up()
        agent.running = None
        if how != "follow":
            break
    except agent.Lost as lost:
        say(lost=[str(part) for part in lost.args])
        phase = "lost"
    report = None
    node_error = node.error
    node = None
if heap:
    say(start=state["start"], peak=state["peak"], at=state["at"])
say(phase=phase, error=node_error, starts=starts)
