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
from .words import channel_problem, consists, is_digest

_KEYS = {
    "release": ("channel", "sequence", "version", "created", "expires", "epoch", "previous"),
    "wheel": ("name", "version", "pkg_sha256", "size", "tag"),
    "src": ("path", "pkg_sha256", "size"),
    "firmware": ("name", "version", "target", "pkg_sha256", "size"),
    "signature": ("key", "alg", "sig"),
}
_OPTIONAL = ("created", "expires", "epoch", "previous", "size", "tag", "target")
_NUMBERS = ("sequence", "epoch", "size")
# What a key's value is when it is no text and no number.
_OTHER = object()
_HASH = const(6)  # bytes of a name's digest that stand for it


def bad(problem):
    return Refused("bad-list", problem)


class Reader:
    """JSON from a file, token by token."""

    def __init__(self, file):
        self.file = file
        self.data = bytearray(256)
        self.at = self.end = 0

    def more(self):
        """Reads on; says whether there was more."""
        self.at = 0
        self.end = self.file.readinto(self.data) or 0
        return self.end > 0

    def peek(self):
        """The next byte that is no white space; 0 at the end."""
        data = self.data
        while True:
            while self.at < self.end:
                byte = data[self.at]
                if byte not in b" \t\n\r":
                    return byte
                self.at += 1
            if not self.more():
                return 0

    def take(self, byte):
        """Goes on behind `byte`, if it is the next one."""
        if self.peek() != byte:
            return False
        self.at += 1
        return True

    def string(self):
        """The string that begins here, as its bytes with their escapes; `None` if it is longer than
        `limits.VALUE`."""
        if not self.take(34):
            raise bad("not JSON: a text is missing")
        text = b""
        escaped = False
        while True:
            if self.at == self.end and not self.more():
                raise bad("not JSON: a text has no end")
            if escaped:
                end = self.at + 1
                escaped = False
            else:
                end = self.data.find(b'"', self.at, self.end)
                slash = self.data.find(b"\\", self.at, self.end if end < 0 else end)
                if slash >= 0:
                    end = slash + 1
                    escaped = True
                elif end < 0:
                    end = self.end
                else:
                    if text is not None:
                        text += self.data[self.at : end]
                    self.at = end + 1
                    return text if text is None or len(text) <= limits.VALUE else None
            if text is not None:
                text += self.data[self.at : end]
                if len(text) > limits.VALUE:
                    text = None
            self.at = end

    def plain(self):
        """The number or word that begins here."""
        text = b""
        while True:
            start = self.at
            while self.at < self.end and self.data[self.at] not in b' \t\n\r,]}[{":':
                self.at += 1
            text += self.data[start : self.at]
            if len(text) > limits.VALUE:
                raise bad("not JSON: a number of more than %d digits" % limits.VALUE)
            if self.at < self.end or not self.more():
                break
        if text not in (b"true", b"false", b"null"):
            for digit in text:
                if digit not in b"0123456789+-.eE":
                    raise bad("not JSON: `%s`" % _shown(text))
            if not text or text[0] not in b"-0123456789":
                raise bad("not JSON: a value is missing")
        return text

    def byte(self):
        """The next byte, even if it is white space; `None` at the end."""
        if self.at == self.end and not self.more():
            return None
        self.at += 1
        return self.data[self.at - 1]

    def skip(self, depth):
        """Goes on behind the value that begins here."""
        kinds = 0  # of the brackets open, as bits
        base = depth
        while True:
            byte = self.peek()
            if byte == 34:
                self.string()
            elif byte in b"[{":
                self.at += 1
                kinds = kinds << 1 | (byte == 123)
                depth += 1
                if depth > limits.DEPTH:
                    raise bad("not JSON: nested deeper than %d" % limits.DEPTH)
            elif byte in b"]}" and depth > base:
                self.at += 1
                if kinds & 1 != (byte == 125):
                    raise bad("not JSON: a bracket has no partner")
                kinds >>= 1
                depth -= 1
            elif byte in b",:" and depth > base:
                self.at += 1
                continue
            elif byte:
                self.plain()
            else:
                raise bad("not JSON: it ends in the middle")
            if depth == base:
                return


def _shown(text):
    try:
        return str(text[:80], "utf-8")
    except UnicodeError:
        return "…"


def _hex4(text):
    value = int(str(text, "ascii"), 16)
    if len(text) != 4 or text[0] in b"+-":
        raise ValueError
    return value


def unescaped(text):
    """What a string's bytes mean."""
    try:
        if b"\\" in text:
            whole = b""
            parts = text.split(b"\\")
            whole = parts.pop(0)
            while parts:
                part = parts.pop(0)
                if not part:
                    # Two in a row.
                    whole += b"\\" + parts.pop(0)
                elif part[0] == 117:  # u
                    code, rest = _hex4(part[1:5]), part[5:]
                    if code >> 10 == 0x36 and not rest and parts[0][:1] == b"u":
                        low = parts.pop(0)
                        if _hex4(low[1:5]) >> 10 != 0x37:
                            raise ValueError
                        code = 0x10000 + ((code & 0x3FF) << 10 | _hex4(low[1:5]) & 0x3FF)
                        rest = low[5:]
                    elif code >> 11 == 0x1B:
                        raise ValueError
                    whole += chr(code).encode() + rest
                else:
                    at = b'"/bfnrt'.find(part[:1])
                    if at < 0:
                        raise ValueError
                    whole += b'"/\b\f\n\r\t'[at : at + 1] + part[1:]
            text = whole
        return str(text, "utf-8")
    except (ValueError, IndexError):  # UnicodeError is a ValueError.
        raise bad("not JSON: `%s` is no text" % _shown(text))


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


def tail(path, offset):
    """The entry behind the `,` at `offset`, which must be the last one, and nothing but `]` may follow."""
    with open(path, "rb") as file:
        file.seek(offset + 1)
        json = Reader(file)
        entry = _entry(json)
        # Byte by byte: white space is something, too.
        if json.byte() != 93 or json.byte() is not None:
            raise bad("something else than `]` follows the signature")
    return entry


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


def is_whole(digits):
    """Whether a number is a whole one of at most 64 bits."""
    for digit in digits:
        if digit not in b"0123456789":
            return False
    return len(digits) <= 20 and (digits == b"0" or digits[0] != 48) and int(digits) < 1 << 64


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
