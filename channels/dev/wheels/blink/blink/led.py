"""One LED: on a pin of the board, or on the console where there are no pins."""

import sys

try:
    from machine import Pin
except ImportError:  # CPython, and MicroPython's Unix port, whose `machine` has no pins
    Pin = None


class Led:
    """The LED on pin `pin`; `active_low` says that it is lit by a low level."""

    def __init__(self, pin, active_low=False):
        self._active_low = active_low
        self._level = False
        self._pin = Pin(pin, Pin.OUT, value=active_low) if Pin else None

    def set(self, level):
        """Lights the LED if `level` is true."""
        level = bool(level)
        if level == self._level:
            return
        self._level = level
        if self._pin:
            self._pin.value(level != self._active_low)
        else:
            sys.stdout.write("●" if level else "○\n")
