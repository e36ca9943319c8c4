"""Whose turn it is to take a release, as each device finds out for itself: the rules of protocol/src/rollout.rs."""

import hashlib

from micropython import const

from . import bounds
from .clock import seconds
from .words import is_time

_DAY = const(86400)


def read(found):
    """The rollout that a release says, checked. Raises `ValueError`, whose text says what is wrong."""
    if not isinstance(found, dict):
        raise ValueError("`rollout` is no object")
    for key in ("id", "percent"):
        if key not in found:
            raise ValueError("`%s` is missing in `rollout`" % key)
    name = found["id"]
    if not isinstance(name, str) or len(name) != 16 or name.encode().strip(b"0123456789abcdef"):
        raise ValueError("`id` of a rollout is 16 lowercase hexadecimal digits")
    percent = _percent(found["percent"])
    for key, kind in (("only", str), ("not-before", str), ("window", str), ("jitter", int), ("base", int)):
        if not isinstance(found.get(key, kind()), kind):
            raise ValueError("`%s` of a rollout is not what it should be" % key)
    if "only" in found:
        from . import query

        try:
            query.holds(found["only"], None)
        except ValueError as error:
            raise ValueError("`only`: %s" % error)
    before = found.get("not-before")
    if before is not None:
        if not is_time(before):
            raise ValueError("`not-before` of a rollout should be a time in UTC such as `2026-11-20T10:00:00Z`")
        # A fraction of a second is not over yet.
        before = seconds(before) + (before[19:-1].strip(".0") != "")
    jitter = found.get("jitter", 0)
    if jitter > bounds.JITTER:
        raise ValueError("`jitter` of a rollout should be a whole number of seconds, at most a day")
    optional = found.get("optional", b"false")
    if not isinstance(optional, bytes) or optional not in (b"true", b"false"):
        raise ValueError("`optional` of a rollout should be `true` or `false`")
    return {
        "id": name,
        "percent": percent,
        "only": found.get("only"),
        "before": before,
        "window": _window(found["window"]) if "window" in found else None,
        "jitter": jitter,
        "optional": optional == b"true",
        "base": found.get("base"),
    }


def _percent(value):
    """In hundredths."""
    found = -1
    if isinstance(value, str):
        whole, point, decimals = value.partition(".")
        decimals = decimals if point else "0"
        if 0 < len(whole) < 4 and 0 < len(decimals) < 3 and _is_digits(whole + decimals):
            found = int(whole) * 100 + int((decimals + "0")[:2])
    elif isinstance(value, int) or isinstance(value, bytes) and value[0] in b"-0123456789":
        # The nearest hundredth, but for the error of small floats.
        number = (value if isinstance(value, int) else float(value.decode())) * 100
        if 0 <= number < 10001 and abs(number - round(number)) <= 0.01:
            found = round(number)
    if not 0 <= found <= 10000:
        raise ValueError("a percentage is a number from 0 to 100 with at most two decimals, as `2.5`")
    return found


def _is_digits(text):
    return not text.encode().strip(b"0123456789")


def _window(text):
    """Its start and end, in seconds of the day."""
    data = text.encode()
    if len(data) == 11 and _is_digits(text[:2] + text[3:5] + text[6:8] + text[9:]):
        start, end = [int(text[at : at + 2]) * 3600 + int(text[at + 3 : at + 5]) * 60 for at in (0, 6)]
        good = text[2] == ":" and text[5] == "-" and text[8] == ":" and start != end
        if good and start < _DAY and end < _DAY and data[3] < 54 and data[9] < 54:
            return start, end
    raise ValueError("a window is two times of day that differ, as `22:00-04:00`")


def position(name, node, at=0):
    """Where a device stands among all, as a fraction of 2 to the power of 32. At 4: for its share of the jitter."""
    digest = hashlib.sha256((name + "\n" + node).encode()).digest()
    return int.from_bytes(digest[at : at + 4], "big")


def share(rollout, node):
    """How many seconds of the jitter a device waits."""
    return position(rollout["id"], node, 4) * (rollout["jitter"] + 1) >> 32


def admits(rollout, node, fact):
    """Whether it is the turn of a device; `fact(field)` is what it says of itself."""
    if position(rollout["id"], node) * 10000 >= rollout["percent"] << 32:
        return False
    if rollout["only"] is None:
        return True
    from . import query

    return query.holds(rollout["only"], fact)


def wait(rollout, node, since, now, offset):
    """How many seconds a device has to wait that saw the list `since` seconds ago; `now` in seconds since 1970,
    or `None`; `offset`: how far local time is ahead, in minutes.

    Its own share of the jitter passes after it saw the list, or after `not-before`, or after the window opened,
    whichever is latest; with a window, the share is of what is left of it.
    """
    delay = share(rollout, node)
    if now is None:
        return max(0, delay - since)
    earliest = max(now - since, rollout["before"] or 0)
    window = rollout["window"]
    if not window:
        return max(0, earliest + delay - now)

    def start(at):
        at += opens_in(window, at, offset)
        return at + delay % max(1, closes_in(window, at, offset))

    planned = start(earliest)
    if planned > now:
        return planned - now
    # If it slept through the window, there is another.
    return start(now) - now if opens_in(window, now, offset) else 0


def opens_in(window, now, offset):
    """In how many seconds a window opens; 0 while it is open."""
    return 0 if closes_in(window, now, offset) else _until(window[0], now, offset)


def closes_in(window, now, offset):
    """In how many seconds a window closes; 0 while it is closed."""
    opens, closes = _until(window[0], now, offset), _until(window[1], now, offset)
    return closes if closes and (not opens or closes < opens) else 0


def _until(time, now, offset):
    return (time - now - offset * 60) % _DAY
