"""Why a list or a release is not applied, and what follows: the words and texts of
agent-sim/src/refusal.rs."""

from micropython import const

from . import limits

# What may work later: it is tried again a few times, then at the next list or connection.
_RETRY = ("missing-package", "connection", "not-allowed", "no-space", "no-memory", "storage")
_ENOSPC = const(28)


class Refused(Exception):
    """`word` is stable, for programs; `text` starts with it and is what a node's state message says in
    `error`."""

    def __init__(self, word, detail):
        super().__init__(word)
        self.word = word
        text = word + ": " + detail
        data = text.encode()
        if len(data) > limits.ERROR_TEXT:
            end = limits.ERROR_TEXT
            while data[end] & 0xC0 == 0x80:
                end -= 1
            text = data[:end].decode()
        self.text = text

    def __str__(self):
        return self.text

    @property
    def verdict(self):
        """`retry`: it may work later. `reject`: remember, and do not try this list again until told to.
        `bug`: the agent contradicts itself; report, change nothing."""
        return "retry" if self.word in _RETRY else "bug" if self.word == "bug" else "reject"


def of_flash(error):
    """The refusal that an `OSError` of the file system amounts to."""
    if error.args and error.args[0] == _ENOSPC:
        return Refused("no-space", "the flash is full")
    return Refused("storage", str(error))


def missing_package(topic):
    return Refused("missing-package", "the broker has no `%s`" % topic)


class Lost(Exception):
    """There is no connection, or none any more. The first argument says why, a second one what may help."""
