"""What a list says of packages that come in chunks: the rules of protocol/src/chunk.rs.

The digests stay where they are, in the list on the flash: there may be more of them than fit into memory. An entry
has `[size, count, place]`: the bytes of a chunk, how many chunks there are, and where in the list the first digest is.
A digest that is written with escapes is none here: `chunks` finds them again without a reader of JSON.
"""

from micropython import const

from . import limits, tokens

# Most chunks of one package; the smallest size of chunks, in bytes, of which the largest is that of a package. As in
# protocol/src/limits.rs.
_MOST = const(1024)
_LEAST = const(1024)


def read(json):
    """The value of `chunks` that begins here; a text if a digest in it is none; `None` if it is something else."""
    if not json.take(123):
        return json.skip(2)
    size = found = None
    more = not json.take(125)
    while more:
        key = json.string()
        key = key and tokens.unescaped(key)
        if not json.take(58):
            raise tokens.bad("not JSON: `:` is missing")
        if key == "size" and json.peek() in b"-0123456789":
            size = json.plain()
            size = int(size) if tokens.is_whole(size) else None
        elif key == "sha256" and json.take(91):
            found = _digest(json)
        else:
            json.skip(3)
        more = json.take(44)
        if not more and not json.take(125):
            raise tokens.bad("not JSON: `,` or `}` is missing")
    if size is None or not found:
        return None
    return [size] + found if isinstance(found, list) else found


# In small pieces: there may be room for no large one when it is wanted.


def _digest(json):
    """How many digests the array has that begins here, and where; a text if one is none."""
    place = json.place()
    problem = None
    count = 0
    more = not json.take(93)
    while more:
        found = json.string() if json.peek() == 34 else json.skip(4)
        if not found or len(found) != 64 or found.strip(b"0123456789abcdef"):
            problem = "number %d is no digest of 64 lowercase hexadecimal digits" % count
        count += 1
        more = json.take(44)
        if not more and not json.take(93):
            raise tokens.bad("not JSON: `,` or `]` is missing")
    return problem or [count, place]


def problem(value, total):
    """What is wrong with what was read, for a package of `total` bytes."""
    if isinstance(value, str):
        return value
    size, count, _ = value
    if not isinstance(total, int):
        return "only with the `size` of the whole"
    if not total:
        return "a package of no bytes has no chunks"
    if not _LEAST <= size <= limits.PACKAGE:
        return "chunks have %d to %d bytes, not %d" % (_LEAST, limits.PACKAGE, size)
    wanted = (total + size - 1) // size
    if wanted > _MOST or wanted != count:
        text = "%d bytes in chunks of %d are %d chunks, not %d, and at most %d"
        return text % (total, size, wanted, count, _MOST)
    return None
