"""Says what this device is and has: the payload of `mpypi/nodes/<node>/info`."""

import json
import os
import sys
import time

from . import __version__
from .files import free
from .records import installed


async def run(agent):
    line = agent.line
    room = free(agent.root)
    await line.publish(agent.topics[1] + "online", b"1")
    size = sum([len(piece) for piece in _info(agent, room)])
    await line.publish(agent.topics[1] + "info", (size, _info(agent, room)))
    if not agent.since:
        # The connection is new.
        agent.since = time.ticks_ms() or 1
        topics = [agent.topics[1] + "cmd", agent.topics[0]]
        agent.asked = {await line.subscribe(topics): topics}
        agent.published = None
        agent.check_later()
        if agent.job and agent.job.open:
            topics = list(agent.job.open)
            agent.asked[await line.subscribe(topics)] = topics
    return "listen"


def _info(agent, room):
    here = sys.implementation
    machine = getattr(here, "_machine", sys.platform)
    if hasattr(os, "uname"):
        machine = os.uname().machine
    text = '{"uname":{"sysname":%s,"machine":%s,"version":%s},"versions":{'
    yield (text % (json.dumps(sys.platform), json.dumps(machine), json.dumps(sys.version))).encode()
    comma = ""
    for record in installed(agent.root):
        if "version" in record:
            yield (comma + json.dumps(record["wheel"]) + ":" + json.dumps(record["version"])).encode()
            comma = ","
    text = '},"channel":"%s","agent":"mpypi/%s","runtime":"micropython-%d.%d"'
    yield (text % (agent.channel, __version__, here.version[0], here.version[1])).encode()
    if hasattr(here, "_mpy"):
        yield b',"mpy":%d' % here._mpy
    yield b',"free":%d}' % room
