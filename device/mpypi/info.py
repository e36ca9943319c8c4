"""What a device says about itself: the payload of `mpypi/nodes/<node>/info`."""

import json
import os
import sys

from . import __version__


def message(agent):
    """The number of its bytes, and a generator of them."""
    free = agent.store.free()
    return sum([len(piece) for piece in _pieces(agent, free)]), _pieces(agent, free)


def _pieces(agent, free):
    here = sys.implementation
    machine = getattr(here, "_machine", sys.platform)
    if hasattr(os, "uname"):
        machine = os.uname().machine
    text = '{"uname":{"sysname":%s,"machine":%s,"version":%s},"versions":{'
    yield (text % (json.dumps(sys.platform), json.dumps(machine), json.dumps(sys.version))).encode()
    comma = ""
    for name, version in agent.store.versions():
        yield (comma + json.dumps(name) + ":" + json.dumps(version)).encode()
        comma = ","
    text = '},"channel":"%s","agent":"mpypi/%s","runtime":"micropython-%d.%d"'
    yield (text % (agent.channel, __version__, here.version[0], here.version[1])).encode()
    if hasattr(here, "_mpy"):
        yield b',"mpy":%d' % here._mpy
    yield b',"free":%d}' % free
