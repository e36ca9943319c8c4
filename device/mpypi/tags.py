"""Which wheels this device runs, and how well: the rules of protocol/src/tag.rs."""

import sys

from . import limits
from .words import consists

_ARCHITECTURES = (
    "x86 x64 armv6 armv6m armv7m armv7em armv7emsp armv7emdp xtensa xtensawin rv32imc rv64imc".split(" ")
)


def platform(name):
    """How a tag spells a platform."""
    text = b""
    for byte in name.lower().encode():
        text += bytes([byte]) if consists(bytes([byte]), b"") else b"_"
    return text.decode()


def rank(tag, mpy=getattr(sys.implementation, "_mpy", None), here=platform(sys.platform)):
    """How well a wheel with this tag fits a device: 0 not at all; the greater, the better.

    `mpy` is `sys.implementation._mpy`: the version in bits 0 to 7, the sub-version in 8 and 9, the
    architecture from 10.
    """
    if tag is None:
        return 2
    parts = tag.split("-")
    if len(parts) != 3 or len(tag) > limits.TEXT:
        return 0
    for part in parts:
        for name in part.split("."):
            if not name or not consists(name.encode(), b"_"):
                return 0
    best = 0
    for python in parts[0].split("."):
        for abi in parts[1].split("."):
            code = _code(python, abi, mpy)
            if code:
                for place in parts[2].split("."):
                    if place in (here, "any"):
                        best = max(best, 2 * code + (place == here))
    return best


def best(mpy=getattr(sys.implementation, "_mpy", None), here=platform(sys.platform)):
    """What would fit a device best, as a tag."""
    if mpy is None:
        return "py3-none-" + (here or "any")
    native = (mpy >> 10 & 15) - 1
    if 0 <= native < len(_ARCHITECTURES):
        return "mpy%d_%d-%s-%s" % (mpy & 255, mpy >> 8 & 3, _ARCHITECTURES[native], here or "any")
    return "mpy%d-bytecode-%s" % (mpy & 255, here or "any")


def _code(python, abi, mpy):
    """What a wheel holds, if it runs here: 1 source, 2 bytecode, more machine code."""
    # PEP 425: `py3` is any Python 3.
    if python.startswith("py3") and _number(python[3:] or "0") is not None:
        return 1 if abi == "none" else 0
    if not python.startswith("mpy") or mpy is None:
        return 0
    version, _, sub_version = python[3:].partition("_")
    if _number(version) != mpy & 0xFF or "_" in python and _number(sub_version) is None:
        return 0
    if abi == "bytecode":
        return 2
    if abi not in _ARCHITECTURES:
        return 0
    native, here = _ARCHITECTURES.index(abi) + 1, mpy >> 10 & 15
    # Each Cortex-M runs what its lesser kin do.
    runs = native == here or 4 <= native < here <= 8
    return 2 + native if runs and ("_" not in python or _number(sub_version) == mpy >> 8 & 3) else 0


def _number(text):
    return int(text) if text and not text.strip("0123456789") else None
