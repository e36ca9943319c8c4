"""Says what this device is and has: the payload of `mpypi/nodes/<node>/info`."""

import binascii
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
        agent.asked = {}
        agent.published = None
        if agent.roots:
            await _ask_for_time(agent)
        await agent.ask([agent.topics[1] + "cmd"])
        await agent.ask_for_list()
        agent.check_later()
        if agent.job and agent.job.open:
            # Sorted, chunks come in order, nearly always.
            await agent.ask(sorted(agent.job.open))
    return "listen"


async def _ask_for_time(agent):
    """Somebody may know what time it is."""
    roots = agent.roots
    roots[2] = 0
    if time.gmtime()[0] < 2024 and roots[4] is None:
        roots[3] = binascii.hexlify(os.urandom(16))
        await agent.ask([agent.topics[1] + "time"])
        await agent.line.publish(agent.topics[1] + "challenge", roots[3], False)


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
    yield b',"free":%d' % room
    if agent.labels:
        yield (',"labels":' + json.dumps(agent.labels)).encode()
    if agent.utc_offset is not None:
        yield b',"utc_offset":%d' % agent.utc_offset
    yield b"}"
