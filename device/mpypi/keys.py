"""Who may sign what: a root, read from a file entry by entry. The rules are those of protocol/src/root.rs.

The newest root that this device believes stands in `.mpypi/root.json`, with the very bytes that were signed.
Numbers in [] are sections of the specification of TUF, 1.0.33.
"""

import binascii

from micropython import const

from . import bounds
from .nested import Entries
from .refusal import Refused
from .rsa import ALGORITHM
from .tokens import bad
from .words import channel_problem, consists, is_time

# The newest root that this device believes.
ROOT = "/.mpypi/root.json"
_MODULUS = const(384)  # bytes of 3072 bits
_ED25519 = const(32)
_KEYS = {
    "root": ("version", "created", "expires", "threshold", "keys"),
    "key": ("id", "alg", "key"),
    "delegation": ("channel", "keys", "epoch", "expires"),
    "signature": ("key", "alg", "sig"),
}
_NUMBERS = ("version", "threshold", "epoch")


def read(path, offset=0):
    """Yields every entry of the root in the file `path`, checked by itself; or those behind the `,` at
    `offset`, which must be signatures with nothing between them, and nothing but `]` behind."""
    with open(path, "rb") as file:
        json = Entries(file)
        if offset:
            file.seek(offset + 1)
        elif not json.take(91):
            raise bad("a root is a JSON array")
        for _ in range(bounds.ENTRIES):
            entry = _checked(json.entry(_ALL))
            yield entry
            if not offset:
                if not json.take(44):
                    if not json.take(93) or json.peek():
                        raise bad("not JSON: `,` or `]` is missing")
                    return
                continue
            # Byte by byte: white space is something, too.
            end = json.byte()
            if entry["type"] == "signature" and end == 93 and json.byte() is None:
                return
            if entry["type"] != "signature" or end != 44:
                raise bad("something else than signatures follows the first one")
        raise bad("more than %d entries" % bounds.ENTRIES)


def _checked(found):
    kind = found.get("type")
    if not isinstance(kind, str):
        raise bad("an entry has no `type`")
    entry = {"type": kind}
    for key in _KEYS.get(kind, ()):
        value = found.get(key)
        if key == "epoch" and value is None:
            value = 0
        if key in _NUMBERS:
            good = isinstance(value, int)
        elif key == "keys":
            good = isinstance(value, list) and not [name for name in value if not is_name(name)]
            good = good and len(set(value)) == len(value)
        else:
            good = isinstance(value, str)
            if key in ("created", "expires"):
                good = good and is_time(value)
            elif key == "id":
                good = good and is_name(value)
            elif key == "channel":
                good = good and (value == "*" or not channel_problem(value))
        if not good:
            raise bad("`%s` of a `%s` is not what it should be" % (key, kind))
        entry[key] = value
    return entry


def is_name(name):
    """Whether a value is the name of a key."""
    data = name.encode() if isinstance(name, str) else b""
    return 0 < len(data) <= bounds.KEY_NAME and consists(data, b"._-") and consists(data[:1], b"")


def base64(text):
    """What a text in base64 stands for; nothing where it is not the only text for that."""
    try:
        data = binascii.a2b_base64(text)
        return data if binascii.b2a_base64(data).strip() == text.encode() else b""
    except ValueError:
        return b""


def modulus(entry):
    """The bytes of an RSA key; `None` of one with an algorithm that is not for this device."""
    data = base64(entry["key"])
    if entry["alg"] == ALGORITHM:
        if len(data) != _MODULUS or data[0] < 128:
            raise bad("key `%s` is no modulus of 3072 bits" % entry["id"])
        return data
    if entry["alg"] == "ed25519" and len(data) != _ED25519:
        raise bad("key `%s` is none of Ed25519" % entry["id"])
    return None


def find(path, name):
    """The modulus of a key of a root: nothing where it is no RSA key, or not there."""
    for entry in read(path):
        if entry["type"] == "key" and entry["id"] == name:
            return modulus(entry) or b""
    return b""


class Signers:
    """Those who may sign the lists of a channel, by the root in the file `path`, which was checked before."""

    def __init__(self, path, channel):
        self.path = path
        self.names = ()
        self.epoch = 0
        self.expires = []
        found = None
        for entry in read(path):
            kind = entry["type"]
            if kind == "root":
                self.expires.append(("root %d" % entry["version"], entry["expires"]))
            elif kind == "delegation" and entry["channel"] in (channel, "*"):
                if not found or entry["channel"] == channel:
                    found = entry
        if found:
            self.expires.append(("what the root says of channel `%s`" % channel, found["expires"]))
            self.names = found["keys"]
            self.epoch = found["epoch"]

    def check_expiry(self, now):
        """Raises `Refused` where the root, or what it says of the channel, expired before `now`: a time as text, or
        `None` if nobody knows it. [5.3.10]: that counts once there is no newer root."""
        for what, expires in self.expires:
            if now and expires[:19] <= now:
                raise Refused("expired-root", "%s expired at %s, it is %sZ" % (what, expires, now))

    def get(self, name):
        """The modulus of one of their keys: nothing where it is no RSA key. `None` of anybody else's."""
        return find(self.path, name) if name in self.names else None


_ALL = set(["type"])
for _keys in _KEYS.values():
    _ALL.update(_keys)
