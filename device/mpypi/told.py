"""Somebody says what time it is, to a device whose clock does not know."""

from . import bounds, clock, keys, rsa
from .files import write
from .judge import now
from .nested import Entries
from .refusal import Refused
from .words import is_time


async def run(agent):
    """An answer to the question that went out with the greeting. Any number of wrong ones may come before the right
    one."""
    line = agent.line
    # A list takes the same place: there is never one on its way at once.
    path = agent.folder + "list.part"
    if line.left > bounds.TIME:
        agent.tell("an answer of %d bytes is larger than %d" % (line.left, bounds.TIME))
        await line.skip()
        return "listen"
    with open(path, "wb") as file:
        while True:
            piece = await line.piece()
            if not piece:
                break
            write(file, piece)
        file.flush()
    roots = agent.roots
    signers = keys.Signers(agent.root + keys.ROOT, "time")
    try:
        told = check(path, signers, agent.node, roots[3].decode())
    except Refused as refused:
        agent.tell("an answer is refused: " + refused.text)
        return "listen"
    roots[3] = None
    # Whatever the clock counts from: what it says now is what it is behind.
    roots[4] = 0
    roots[4] = clock.seconds(told) - clock.seconds(now(agent))
    agent.tell("it is " + told)
    # What was believed without knowing the time may have expired.
    await agent.ask_for_list()
    return "listen"


def check(path, signers, node, nonce):
    """The time that the answer in a file says to this device's question, signed by one of `signers`."""
    rsa.check(path, signers)
    with open(path, "rb") as file:
        json = Entries(file)
        found = json.take(91) and json.entry(("type", "node", "nonce", "time"))
    if not found or found.get("type") != "time" or found.get("node") != node or found.get("nonce") != nonce:
        raise Refused("bad-list", "it is no answer to what this device asked")
    told = found.get("time")
    if not isinstance(told, str) or not is_time(told):
        raise Refused("bad-list", "`time` is no time in UTC such as `2026-11-20T10:00:00Z`")
    return told
