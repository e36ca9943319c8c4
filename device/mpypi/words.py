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
