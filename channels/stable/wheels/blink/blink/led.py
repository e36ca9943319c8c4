"""One LED: on a pin of the board, or on the console where there are no pins."""

import sys

try:
    from machine import Pin
except ImportError:  # CPython, and MicroPython's Unix port, whose `machine` has no pins
    Pin = None


class Led:
    """The LED on pin `pin`."""

    def __init__(self, pin):
        self._level = False
        self._pin = Pin(pin, Pin.OUT, value=False) if Pin else None

    def set(self, level):
        """Lights the LED if `level` is true."""
        level = bool(level)
        if level == self._level:
            return
        self._level = level
        if self._pin:
            self._pin.value(level)
        else:
            sys.stdout.write("●" if level else "○\n")
