"""Where the update stands: the payload of `mpypi/nodes/<node>/state`."""

import json
import time

from . import limits


async def report(agent):
    """Reports a change at once, and mere progress at a bounded rate."""
    now = time.ticks_ms()
    state = (agent.phase, agent.seen.get("sequence"), agent.seen.get("version"), agent.error, agent.attempt)
    held = agent.turn and agent.turn["sequence"]
    progress = (agent.done, agent.total)
    state += (held,)
    if agent.published and agent.published[0] == state:
        if agent.published[1] == progress or time.ticks_diff(now, agent.published_at) < limits.PROGRESS:
            return
    text = '{"phase":"%s"' % agent.phase
    if state[1] is not None:
        text += ',"sequence":%d' % state[1]
    if state[2] is not None:
        text += ',"version":' + json.dumps(state[2])
    text += ',"done":%d,"total":%d' % progress
    if agent.error is not None:
        text += ',"error":' + json.dumps(agent.error)
    text += ',"attempt":%d' % agent.attempt
    if held is not None:
        text += ',"held":%d' % held
    text += "}"
    await agent.line.publish(agent.topics[1] + "state", text.encode())
    agent.published = (state, progress)
    agent.published_at = now
