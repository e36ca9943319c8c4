"""JSON with arrays and objects in it: roots, and what a release says beside texts and numbers."""

from . import bounds, limits
from .tokens import Reader, bad, is_whole, unescaped

_ROLLOUT = ("id", "percent", "only", "not-before", "window", "jitter", "optional", "base")


class Entries(Reader):
    """Entries from a file, one after the other."""

    def entry(self, keys, inner=()):
        """The object that begins here: what it says of `keys`; of objects that are a value of one of these, what they
        say of `inner`."""
        if not self.take(123):
            raise bad("an entry is a JSON object")
        found = {}
        more = not self.take(125)
        while more:
            key = self.string()
            key = key and unescaped(key)
            if not self.take(58):
                raise bad("not JSON: `:` is missing")
            if key in keys:
                found[key] = self.value(key, inner)
            else:
                self.skip(2)
            more = self.take(44)
            if not more and not self.take(125):
                raise bad("not JSON: `,` or `}` is missing")
        return found

    def value(self, key, inner):
        """The value that begins here: a text; a whole number; any other number, `true`, `false` and `null` as bytes;
        an array or an object of these, in which what is deeper is `None`."""
        byte = self.peek()
        if byte == 34:
            value = self.string()
            if value is None:
                raise bad("`%s` is longer than %d bytes" % (key, limits.VALUE))
            return unescaped(value)
        if byte not in b"[{":
            value = self.plain()
            return int(value) if is_whole(value) else value
        if inner is None:
            self.skip(2)
            return None
        if byte == 123:
            return self.entry(inner, None)
        self.at += 1
        values = []
        more = not self.take(93)
        while more:
            if len(values) == bounds.VALUES:
                raise bad("`%s` has more than %d values" % (key, bounds.VALUES))
            values.append(self.value(key, None))
            more = self.take(44)
            if not more and not self.take(93):
                raise bad("not JSON: `,` or `]` is missing")
        return values


def release(path):
    """What the release of the list in the file `path` says of `rollout` and `revoked`. The list was read before."""
    with open(path, "rb") as file:
        json = Entries(file)
        json.take(91)
        found = json.entry(("revoked", "rollout"), _ROLLOUT)
    revoked = found.get("revoked", [])
    if not isinstance(revoked, list) or [one for one in revoked if not isinstance(one, int)]:
        raise bad("`revoked` is an array of sequences")
    return found
