"""What a device and its channel may be called: protocol/src/topic.rs."""

import sys

from . import limits


def checked(channel, node):
    """Both names, checked; a device that was given none is called by its platform and its chip's id."""
    from .lists import channel_problem

    problem = channel_problem(channel)
    if problem:
        raise ValueError(problem)
    if node is None:
        try:
            import machine
            from binascii import hexlify

            node = sys.platform + "-" + hexlify(machine.unique_id()).decode()
        except (ImportError, AttributeError):
            raise ValueError("this device has no id of its own: give `node`")
    if not is_node(node):
        text = "`%s` is no node name: use 1 to %d bytes without `/`, `+`, `#` and control characters"
        raise ValueError(text % (node[:80], limits.NODE_NAME))
    return channel, node


def is_node(name):
    for char in name:
        if char in "/+#" or ord(char) < 32 or 127 <= ord(char) < 160:
            return False
    return 0 < len(name.encode()) <= limits.NODE_NAME
