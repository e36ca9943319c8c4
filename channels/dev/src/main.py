"""Shows that a board is alive: the logo on its console, then a pattern on its LED.

Runs on a board, on MicroPython's Unix port and on CPython.
"""

import json
import sys

# A board looks in /lib anyway. A computer does not look below the folder it runs in.
if "lib" not in sys.path:
    sys.path.append("lib")

import blink

SETTINGS = "settings.json"
LOGO = "assets/logo.pbm"

DEFAULTS = {
    "led_pin": 2,  # the blue LED of most ESP32 boards
    "active_low": False,
    "pattern": "heartbeat",
    "text": "OK",  # what the pattern `morse` says
    "pause_ms": 1000,
}


def load_settings(path=SETTINGS):
    """The defaults, with what the file says in their place.

    A file that is missing or broken must not keep a board from starting: nobody may be near to mend it.
    """
    settings = dict(DEFAULTS)
    try:
        with open(path) as file:
            settings.update(json.load(file))
    except (OSError, ValueError, TypeError) as error:
        print("settings:", path, "not used:", error)
    return settings


def show(path=LOGO):
    """Prints a bitmap (PBM, `P4`) with two rows of pixels to a line."""
    try:
        with open(path, "rb") as file:
            if file.readline().strip() != b"P4":
                raise ValueError("not a P4 bitmap")
            width, height = [int(number) for number in file.readline().split()]
            stride = (width + 7) // 8
            for _ in range(0, height, 2):
                upper = file.read(stride)
                lower = file.read(stride) or bytes(stride)
                print("".join(half_blocks(upper, lower, width)).rstrip())
    except (OSError, ValueError, IndexError) as error:
        print("logo:", path, "not shown:", error)


def half_blocks(upper, lower, width):
    """One character for each pair of pixels, one above the other."""
    for x in range(width):
        bit = 0x80 >> x % 8
        yield " ▀▄█"[bool(upper[x // 8] & bit) + 2 * bool(lower[x // 8] & bit)]


def steps(settings):
    """The steps of the pattern that the settings name; puts the default there if it is not known."""
    name = settings["pattern"]
    if name == "morse":
        return blink.morse(settings["text"])
    if name not in blink.PATTERNS:
        print("pattern:", name, "not known, one of morse,", ", ".join(sorted(blink.PATTERNS)))
        name = settings["pattern"] = DEFAULTS["pattern"]
    return blink.PATTERNS[name]


def main(rounds=None):
    """Repeats the pattern, for ever unless `rounds` says how often."""
    settings = load_settings()
    show()
    led = blink.Led(settings["led_pin"], settings["active_low"])
    pattern = list(steps(settings)) + [(0, settings["pause_ms"])]
    print("blink", blink.__version__, "plays", settings["pattern"])
    blink.play(led, pattern, rounds)


if __name__ == "__main__":
    main()
