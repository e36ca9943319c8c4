"""A newer root: takes it in, and believes it if the one before does. See `keys` for what it says."""

import hashlib
import os

from . import bounds, keys, rsa
from .files import sync, write
from .refusal import Refused


async def run(agent):
    """A root has come that may be the next one."""
    line, roots = agent.line, agent.roots
    path = agent.root + keys.ROOT
    part, number = path + ".new", roots[0] + 1
    try:
        if line.left > bounds.ROOT:
            raise Refused("bad-root", "a root of %d bytes is larger than %d" % (line.left, bounds.ROOT))
        with open(part, "wb") as file:
            while True:
                piece = await line.piece()
                if not piece:
                    break
                write(file, piece)
            file.flush()
        step(path, part, number)
    except Refused as refused:
        if refused.word != "bad-root":
            raise
        # What is believed stays; the walk ends here until somebody puts it right.
        agent.tell("root %d is refused: %s" % (number, refused.text))
        await line.skip()
        if not agent.job and not agent.confirming:
            agent.fail(refused)
        return "listen"
    # [5.3.8]: kept before it is used.
    os.rename(part, path)
    sync()
    roots[:2] = number, topic(number)
    agent.tell("believing root %d" % number)
    # [5.3.9]: on to the next; then the list once more, which may be what this root is for.
    await agent.ask_for_list()
    return "listen"


def topic(version):
    """Where the root after a version would be."""
    return "mpypi/keys/root/%d" % (version + 1)


def version(path):
    """The version that a root says it has."""
    for entry in keys.read(path):
        return entry.get("version", 0)


def check(path):
    """Whether a root is one, and enough of its own keys signed it. -> its version"""
    try:
        root = _read(path)
        _count(path, [(path, root)])
    except Refused as refused:
        raise _bad(refused)
    return root["version"]


def step(old, new, number):
    """Whether the root in the file `new`, which was retained as `number`, follows the one in `old`."""
    try:
        before = version(old)
        root = _read(new)
        # [5.3.5]: exactly the next.
        if root["version"] != number or number != before + 1:
            text = "root %d came as number %d, and follows %d"
            raise Refused("bad-root", text % (root["version"], number, before))
        # [5.3.4]: by a threshold of the keys of the root before, and by one of its own.
        for entry in keys.read(old):
            _count(new, [(old, entry), (new, root)])
            break
    except Refused as refused:
        raise _bad(refused)


def _bad(refused):
    if refused.word != "bad-list":
        return refused
    return Refused("bad-root", refused.text[len("bad-list: ") :])


def _read(path):
    """Checks what the entries of a root are to each other. -> its first entry"""
    if os.stat(path)[6] > bounds.ROOT:
        raise keys.bad("it is larger than %d bytes" % bounds.ROOT)
    root = None
    names = []  # of its keys
    channels = []
    values = set()  # of the keys, hashed
    wanted = set()
    signatures = 0
    for entry in keys.read(path):
        kind = entry["type"]
        if root is None:
            if kind != "root":
                raise keys.bad("it does not begin with `root`")
            root = entry
            if not 0 < entry["threshold"] <= len(entry["keys"]) or not entry["version"]:
                raise keys.bad("threshold %d of %d keys" % (entry["threshold"], len(entry["keys"])))
            wanted.update(entry["keys"])
        elif kind == "root":
            raise keys.bad("it has a second `root`")
        elif signatures and kind != "signature":
            raise keys.bad("something else than signatures follows the first one")
        elif kind == "signature":
            signatures += 1
        elif kind == "key":
            # [5.3.4]: a threshold counts keys, so no key may have two names.
            value = hashlib.sha256(keys.modulus(entry) or entry["key"].encode()).digest()[:8]
            if entry["id"] in names or value in values:
                raise keys.bad("key `%s` is there twice" % entry["id"])
            names.append(entry["id"])
            values.add(value)
        elif kind == "delegation":
            if entry["channel"] in channels:
                raise keys.bad("channel `%s` is delegated twice" % entry["channel"])
            channels.append(entry["channel"])
            wanted.update(entry["keys"])
    if len(names) > bounds.KEYS or len(channels) > bounds.DELEGATIONS or signatures > bounds.SIGNATURES:
        raise keys.bad("it has too many entries")
    for name in wanted:
        if name not in names:
            raise keys.bad("key `%s` is not there" % name)
    return root


def _count(path, sides):
    """Raises `Refused` unless the root in the file `path` has a threshold of good signatures for each of
    `sides`: the file of a root, and its first entry."""
    found = rsa.split(path, True)
    if found is None:
        raise keys.bad("it has no signature")
    offset, marks, digest = found
    good = [set() for _ in sides]
    for entry in keys.read(path, offset):
        marks -= 1
        name, last = entry["key"], None
        for (file, root), names in zip(sides, good):
            if name not in root["keys"] or name in names or entry["alg"] != rsa.ALGORITHM:
                continue
            modulus = keys.find(file, name)
            # The same key in both roots needs one look.
            if not last or last[0] != modulus:
                last = modulus, rsa.is_good(modulus, digest, keys.base64(entry["sig"]))
            if last[1]:
                names.add(name)
    # Each has to begin as the first does.
    if marks:
        raise keys.bad("something else than signatures follows the first one")
    for (_, root), names in zip(sides, good):
        if len(names) < root["threshold"]:
            text = "%d of the keys of root %d signed it, and it takes %d"
            raise keys.bad(text % (len(names), root["version"], root["threshold"]))
