"""Blinking patterns for one LED, on MicroPython boards and on any computer.

A pattern is a sequence of steps, each a level (1 is lit) and how long it is held, in milliseconds.
"""

from .led import Led
from .patterns import PATTERNS, morse

try:
    from time import sleep_ms
except ImportError:  # CPython
    from time import sleep

    def sleep_ms(ms):
        sleep(ms / 1000)


__version__ = "1.1.0"
__all__ = ["Led", "PATTERNS", "morse", "play"]


def play(led, pattern, rounds=None, sleep_ms=sleep_ms):
    """Shows `pattern` on `led`, for ever unless `rounds` says how often. The LED is off afterwards.

    `sleep_ms` can be another function, to test without waiting or to feed a watchdog.
    """
    try:
        while rounds is None or rounds > 0:
            for level, ms in pattern:
                led.set(level)
                sleep_ms(ms)
            if rounds is not None:
                rounds -= 1
    finally:
        led.set(0)
