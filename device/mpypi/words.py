"""What a text consists of: digests, and the names of channels. See `paths` for why byte by byte."""

from . import limits


def consists(data, more):
    """Whether bytes are only ASCII letters, digits, and those of `more`."""
    for byte in data:
        if not (97 <= byte | 32 <= 122 or 48 <= byte <= 57 or byte in more):
            return False
    return True


def is_digest(text):
    """Whether a text is a SHA-256 in lower case."""
    data = text.encode()
    return len(data) == 64 and not data.strip(b"0123456789abcdef")


def channel_problem(name):
    """What is wrong with the name of a channel."""
    data = name.encode()
    if 0 < len(data) <= limits.CHANNEL_NAME and consists(data, b"._-") and consists(data[:1], b""):
        return None
    text = "`%s` is no channel name: use letters, digits, `.`, `_` and `-`, a letter or digit first"
    return text % name[:80]


def is_time(text):
    """Whether a text is a time in UTC such as `2026-11-20T10:00:00Z`."""
    data = text.encode()
    if len(data) < 20 or data[-1] != 90:
        return False
    for at in range(len(data) - 1):
        # The form, then a fraction.
        form = b"0000-00-00T00:00:00."[at] if at < 20 else 48
        if not (48 <= data[at] <= 57 if form == 48 else data[at] == form):
            return False
    if len(data) == 21 or len(data) > 30:
        return False
    year, month, day = int(text[:4]), int(text[5:7]), int(text[8:10])
    days = 28 if month == 2 else 30 if month in (4, 6, 9, 11) else 31
    if month == 2 and year % 4 == 0 and (year % 100 or year % 400 == 0):
        days = 29
    return (
        1 <= month <= 12
        and 1 <= day <= days
        and int(text[11:13]) < 24
        and int(text[14:16]) < 60
        and int(text[17:19]) < 60
    )
