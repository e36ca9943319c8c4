"""Checks the signature of an update list: `rsa3072-pkcs1v15-sha256`, that is RSASSA-PKCS1-v1_5 (RFC 8017,
8.2.2).

Works where `pow` takes no third argument. Everything here is public, so nothing needs to take the same time
always.
"""

import binascii
import hashlib

from micropython import const

from . import limits
from .refusal import Refused

ALGORITHM = "rsa3072-pkcs1v15-sha256"
# RFC 8017, 9.2, note 1: the DigestInfo of SHA-256.
_SHA256 = b"\x30\x31\x30\x0d\x06\x09\x60\x86\x48\x01\x65\x03\x04\x02\x01\x05\x00\x04\x20"
_SIZE = const(384)  # bytes of a modulus of 3072 bits
_MARK = b',{"type":"signature"'


def power(base, modulus):
    """`base` to the power of 65537, modulo `modulus`."""
    power = base
    for _ in range(16):
        power = power * power % modulus
    return power * base % modulus


def is_good(modulus, digest, signature):
    """Whether `signature` is that of the SHA-256 `digest` by the key with this modulus and the exponent
    65537.

    All are bytes, most significant first. The whole block is made again and compared: nothing in it is read,
    so nothing in it can be read wrongly.
    """
    # RFC 8017, 8.2.2 step 1, and 5.2.2 step 1.
    if len(signature) != _SIZE or len(modulus) != _SIZE or modulus[0] < 128 or signature >= modulus:
        return False
    block = b"\x00\x01" + b"\xff" * (_SIZE - 54) + b"\x00" + _SHA256 + digest
    found = power(int.from_bytes(signature, "big"), int.from_bytes(modulus, "big"))
    return found == int.from_bytes(block, "big")


def _marks(file):
    """Yields where each mark begins in a file."""
    data = bytearray(limits.PIECE // 2)
    view = memoryview(data)
    keep = len(_MARK) - 1
    # `at` is where in the file the buffer begins. Enough of its end is kept to see a mark across two readings.
    at = kept = 0
    while True:
        got = file.readinto(view[kept:])
        if not got:
            return
        end = kept + got
        here = data.find(_MARK, 0, end)
        while here >= 0:
            yield at + here
            here = data.find(_MARK, here + 1, end)
        kept = min(keep, end)
        data[:kept] = data[end - kept : end]
        at += end - kept


def split(path, first=False):
    """Where the last mark begins in a file, or the first; how many there are; and the SHA-256 of everything
    before it. `None` if there is none."""
    found, count = None, 0
    with open(path, "rb") as file:
        for at in _marks(file):
            count += 1
            if not first or found is None:
                found = at
        if found is None:
            return None
        file.seek(0)
        piece = memoryview(bytearray(limits.PIECE // 2))
        digest = hashlib.sha256()
        left = found
        while left:
            got = file.readinto(piece[: min(left, len(piece))])
            if not got:
                return None
            digest.update(piece[:got])
            left -= got
    return found, count, digest.digest()


def check(path, keys):
    """Checks the signature of the list in the file `path` by one of `keys`: a dict of moduli in hexadecimal by
    name, or `keys.Signers`.

    It covers every byte before the last `,{"type":"signature"`; what follows must be exactly one such object
    and `]`.
    """
    found = split(path)
    if found is None:
        raise Refused("unsigned", "the list has no signature, and this device takes none without")
    offset, _, digest = found
    from . import keys as others

    entry = None
    for found in others.read(path, offset):
        if entry:
            raise Refused("bad-list", "something else than `]` follows the signature")
        entry = found
        if entry["type"] != "signature":
            raise Refused("bad-signature", "what ends the list is no signature")
    if entry["alg"] != ALGORITHM:
        raise Refused("bad-signature", "this device knows `%s`, not `%s`" % (ALGORITHM, entry["alg"]))
    modulus = keys.get(entry["key"])
    if modulus is None:
        text = "the list is signed by `%s`, whom this device does not know"
        raise Refused("unknown-key", text % entry["key"])
    try:
        signature = binascii.a2b_base64(entry["sig"])
        # Only one text stands for a signature.
        if binascii.b2a_base64(signature).strip() != entry["sig"].encode():
            raise ValueError
    except ValueError:
        signature = b""
    if isinstance(modulus, str):
        modulus = binascii.unhexlify(modulus)
    if not is_good(modulus, digest, signature):
        raise Refused("bad-signature", "the list is not what `%s` signed" % entry["key"])
