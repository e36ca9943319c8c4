"""Update lists, read from a file entry by entry: the rules of protocol/src/list.rs.

An entry is a dict of what this agent knows of it; other keys are skipped. Different from the Rust side, on
purpose:

- A key or value of more than `limits.VALUE` bytes is skipped as an unknown one is; a known one is refused.
- At most `limits.ENTRIES` entries are taken.
- What is skipped is not held against all of JSON's grammar: brackets, strings and plain values, in any order.
"""

import hashlib

from micropython import const

from . import limits
from .paths import check_path, has_control, normalized
from .refusal import Refused
from .tokens import Reader, bad, is_whole, unescaped
from .words import channel_problem, consists, is_digest, is_time

_KEYS = {
    "release": ("channel", "sequence", "version", "created", "expires", "epoch", "previous"),
    "wheel": ("name", "version", "pkg_sha256", "size", "tag", "chunks"),
    "src": ("path", "pkg_sha256", "size", "chunks"),
    "firmware": ("name", "version", "target", "pkg_sha256", "size", "chunks"),
    "signature": ("key", "alg", "sig"),
}
_OPTIONAL = ("created", "expires", "epoch", "previous", "size", "tag", "target", "chunks")
_NUMBERS = ("sequence", "epoch", "size")
# What a key's value is when it is no text and no number.
_OTHER = object()
_HASH = const(6)  # bytes of a name's digest that stand for it


def read(path):
    """Yields every entry of the list in the file `path`, checked by itself."""
    with open(path, "rb") as file:
        json = Reader(file)
        if not json.take(91):
            raise bad("an update list is a JSON array" if json.peek() else "not JSON: there is nothing")
        index = 0
        more = not json.take(93)
        while more:
            if index == limits.ENTRIES:
                raise bad("more than %d entries are more than this device takes" % index)
            try:
                yield _entry(json)
            except Refused as refused:
                raise bad("entry %d: %s" % (index, refused.text[len(refused.word) + 2 :]))
            index += 1
            more = json.take(44)
            if not more and not json.take(93):
                raise bad("not JSON: `,` or `]` is missing after entry %d" % (index - 1))
        if json.peek():
            raise bad("not JSON: something follows the list")


def _entry(json):
    if not json.take(123):
        raise bad("an entry is a JSON object")
    found = {}
    more = not json.take(125)
    while more:
        key = json.string()
        key = key and unescaped(key)
        if not json.take(58):
            raise bad("not JSON: `:` is missing")
        byte = json.peek()
        if key not in _ALL:
            json.skip(2)
        elif key == "chunks":
            from . import chunked

            found[key] = chunked.read(json) or _OTHER
        elif byte == 34:
            value = json.string()
            if value is None:
                raise bad("`%s` is longer than %d bytes" % (key, limits.VALUE))
            found[key] = unescaped(value)
        elif byte in b"-0123456789":
            value = json.plain()
            found[key] = int(value) if is_whole(value) else _OTHER
        else:
            json.skip(2)
            found[key] = _OTHER
        more = json.take(44)
        if not more and not json.take(125):
            raise bad("not JSON: `,` or `}` is missing")
    return _checked(found)


def _checked(found):
    kind = found.get("type")
    if not isinstance(kind, str):
        raise bad("`type` should be a string" if "type" in found else "`type` is missing")
    entry = {"type": kind}
    for key in _KEYS.get(kind, ()):
        value = found.get(key)
        if value is None:
            if key not in _OPTIONAL:
                raise bad("`%s` is missing" % key)
        elif isinstance(value, int) != (key in _NUMBERS) or value is _OTHER:
            raise bad("`%s` is not what it should be" % key)
        else:
            if key == "chunks":
                from . import chunked

                problem = chunked.problem(value, found.get("size"))
            else:
                problem = _problem(kind, key, value)
            if problem:
                raise bad("`%s`: %s" % (key, problem))
            entry[key] = value
    if kind == "release":
        entry["more"] = "revoked" in found or "rollout" in found
    return entry


def _problem(kind, key, value):
    """What is wrong with a value of the right type."""
    if key in _NUMBERS or key == "sig":
        return None
    if key == "path":
        try:
            check_path(value)
        except ValueError as error:
            return str(error)
        if "+" in value or "#" in value:
            return "path `%s` has a character which no MQTT topic can carry" % value
        return None
    if key == "channel":
        return channel_problem(value)
    if key in ("pkg_sha256", "previous"):
        if is_digest(value):
            return None
        return "a digest is 64 lowercase hexadecimal digits, not `%s`" % value[:80]
    if key in ("created", "expires"):
        if is_time(value):
            return None
        return "`%s` is no time in UTC such as `2026-11-20T10:00:00Z`" % value[:40]
    data = value.encode()
    if not 0 < len(data) <= limits.TEXT:
        return "a text should have 1 to %d bytes" % limits.TEXT
    if has_control(data):
        return "a control character does not belong here"
    if kind == "wheel" and key == "name":
        if not consists(data, b"._-") or not consists(data[:1] + data[-1:], b""):
            return "`%s` is no package name: use letters, digits, `.`, `_` and `-`" % value
    elif kind == "wheel" and key == "version" and not consists(data, b"._-+!"):
        return "`%s` is no version: use letters, digits, `.`, `_`, `-`, `+` and `!`" % value
    return None


# What a release may say beside is read by `nested`.
_ALL = set(("type", "revoked", "rollout"))
for _keys in _KEYS.values():
    _ALL.update(_keys)


def _hashed(kind, name):
    return hashlib.sha256((kind + name).encode()).digest()[:_HASH]


def _find(table, key, width):
    """Where a row of `table` begins with `key`, or -1."""
    at = table.find(key)
    while at >= 0 and at % width:
        at = table.find(key, at + 1)
    return at


def check(path, rank):
    """Reads the whole list in the file `path`, and checks what its entries are to each other.

    `rank(tag)` says how well a wheel with that tag suits this device: 0 not at all; of several wheels of one
    name, the first of the highest rank is taken.

    -> `release`: its entry; `packages`: whether the list names any; `orders`: `check`, `install`, `rollback`,
    `restart`, in order;
    `ours`: a bitmap of the entries that are wheels and files for this device; `unfit`: a wheel, if none of
    its name suits this device; `skipped`: what is not for this agent, for people
    """
    names = bytearray()  # of everything that may be there once, hashed
    wheels = bytearray()  # rows of a name, hashed; the index of the wheel chosen, and its rank
    row = _HASH + 3
    ours = bytearray()
    release = None
    orders = []
    skipped = []
    packages = signed = folders = False
    index = -1
    for entry in read(path):
        index += 1
        if not index & 7:
            ours.append(0)
        kind = entry["type"]
        name = None
        if signed:
            raise bad("entry %d: a signature comes last, once" % (index - 1))
        if kind == "release":
            if index:
                raise bad("entry %d: a release comes first, once" % index)
            release = entry
        elif kind == "src":
            name = entry["path"]
            folders = folders or "/" in name
            ours[-1] |= 1 << (index & 7)
        elif kind == "wheel":
            name = normalized(entry["name"])
            key = _hashed("", name)
            at = _find(wheels, key, row)
            if at < 0:
                at = len(wheels)
                wheels.extend(key + b"\x00\x00\x00")
            good = rank(entry.get("tag"))
            if good > wheels[at + row - 1]:
                wheels[at + _HASH : at + row] = bytes([index >> 8, index & 255, good])
        elif kind == "firmware":
            name = entry["name"]
            if len(skipped) < 4:
                skipped.append("firmware `%s %s`" % (name, entry["version"]))
        elif kind == "signature":
            signed = True
        elif kind in ("check", "install", "rollback", "restart"):
            orders.append(kind)
        elif len(skipped) < 4:
            skipped.append("an entry of unknown type `%s`" % kind[:40])
        if name is not None:
            packages = True
            tag = entry.get("tag") or entry.get("target")
            if tag:
                name += " (" + tag + ")"
            key = _hashed(kind, name)
            if _find(names, key, _HASH) >= 0:
                raise bad("entry %d (`%s`): `%s` is in the list twice" % (index, kind, name))
            names.extend(key)
    unfit = hashed = None
    for at in range(0, len(wheels), row):
        if wheels[at + row - 1]:
            index = wheels[at + _HASH] << 8 | wheels[at + _HASH + 1]
            ours[index >> 3] |= 1 << (index & 7)
        elif hashed is None:
            hashed = bytes(wheels[at : at + _HASH])
    if folders or hashed:
        index = -1
        for entry in read(path):
            index += 1
            if entry["type"] == "src":
                _check_folders(index, entry["path"], names)
            elif entry["type"] == "wheel" and not unfit and hashed == _hashed("", normalized(entry["name"])):
                unfit = entry
    return {
        "release": release,
        "packages": packages,
        "orders": orders,
        "ours": ours,
        "unfit": unfit,
        "skipped": skipped,
    }


def _check_folders(index, path, names):
    at = path.find("/")
    while at >= 0:
        if _find(names, _hashed("src", path[:at]), _HASH) >= 0:
            text = "entry %d (`src`): `%s` is a file in this list, so nothing can be below it"
            raise bad(text % (index, path[:at]))
        at = path.find("/", at + 1)
