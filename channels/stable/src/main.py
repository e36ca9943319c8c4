"""Shows that a board is alive: a pattern on its LED.

Runs on a board, on MicroPython's Unix port and on CPython.
"""

import json
import sys

# A board looks in /lib anyway. A computer does not look below the folder it runs in.
if "lib" not in sys.path:
    sys.path.append("lib")

import blink


def main(rounds=None):
    """Repeats the pattern, for ever unless `rounds` says how often."""
    with open("settings.json") as file:
        settings = json.load(file)
    led = blink.Led(settings["led_pin"])
    print("blink", blink.__version__, "plays", settings["pattern"])
    blink.play(led, blink.PATTERNS[settings["pattern"]], rounds)


if __name__ == "__main__":
    main()
