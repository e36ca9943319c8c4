"""Ready-made patterns, and Morse code."""

PATTERNS = {
    "steady": ((1, 1000),),
    "blink": ((1, 500), (0, 500)),
    "heartbeat": ((1, 60), (0, 140), (1, 60), (0, 740)),
    "hurry": ((1, 60), (0, 60)),
}

# ITU-R M.1677-1. Characters that are not here are left out.
_MORSE = {
    "A": ".-", "B": "-...", "C": "-.-.", "D": "-..", "E": ".", "F": "..-.", "G": "--.", "H": "....",
    "I": "..", "J": ".---", "K": "-.-", "L": ".-..", "M": "--", "N": "-.", "O": "---", "P": ".--.",
    "Q": "--.-", "R": ".-.", "S": "...", "T": "-", "U": "..-", "V": "...-", "W": ".--", "X": "-..-",
    "Y": "-.--", "Z": "--..", "0": "-----", "1": ".----", "2": "..---", "3": "...--", "4": "....-",
    "5": ".....", "6": "-....", "7": "--...", "8": "---..", "9": "----.",
}


def morse(text, unit_ms=120):
    """The steps of `text` in Morse code.

    A dot is one unit long and a dash three; signs are one unit apart, letters three and words seven.
    """
    for word in text.upper().split():
        for letter in word:
            signs = _MORSE.get(letter, "")
            for sign in signs:
                yield (1, unit_ms if sign == "." else 3 * unit_ms)
                yield (0, unit_ms)
            if signs:
                yield (0, 2 * unit_ms)
        yield (0, 4 * unit_ms)
