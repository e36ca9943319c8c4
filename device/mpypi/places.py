"""Several addresses of a broker, the nodes of one cluster: the rules of agent-sim/src/choice.rs.

A device stays where it is answered. Where it was, it tries once more when the connection breaks, then it goes to any of the
others. From one that has an older list than it has seen it moves on after a while; it never goes back with it.
"""

import random
import time

from . import names


def init(agent, servers, user, password, ca):
    """`agent.servers`: whether the last connection was a good one; when to leave, if that is to be; the servers."""
    agent.servers = [False, None]
    agent.servers += [names.server(one.strip(), user, password, ca) for one in servers.split(",")]
    agent.server = agent.servers[2 + random.getrandbits(16) % (len(agent.servers) - 2)]


def lost(agent):
    """There is no connection: where to try next."""
    servers = agent.servers
    if not servers[0]:
        others = [one for one in servers[2:] if one is not agent.server]
        agent.server = others[random.getrandbits(16) % len(others)]
    servers[0], servers[1] = False, None


def behind(agent, refused):
    """A list is older than one that was seen. A cluster is given time to bring what is newer; not all devices leave at
    once."""
    agent.tell("this broker is behind others: " + refused.text)
    if agent.servers[1] is None:
        agent.servers[1] = time.ticks_add(time.ticks_ms(), 5000 + random.getrandbits(16) * 25 // 65)


def look(agent):
    """Leaves, if it is time."""
    at = agent.servers[1]
    if at is not None and time.ticks_diff(at, time.ticks_ms()) <= 0:
        agent.servers[0] = False
        raise agent.line.lost("it is behind others")
