"""Before anything else."""

import gc

from . import limits
from .agent import tidy

# The largest first; each brings what it imports.
MODULES = (
    "wheel lists plan start dial gather listen judge survey commit unpack greet "
    "arrive incoming chunks chunked fail confirm leave"
)


def up():
    """Where memory is short, has every module in memory once, the largest first: what stays of each, its
    names, then lies where it does not cut what is free to pieces.
    """
    for name in MODULES.split(" "):
        if gc.mem_free() > limits.PLENTY:
            return
        __import__("mpypi." + name)
        tidy()
