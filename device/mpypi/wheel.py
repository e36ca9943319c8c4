"""Unpacks a verified wheel into staging, by its RECORD, piece by piece.

RECORD decides: every file it names must be in the archive with the digest it says, and nothing else is
installed.
"""

import binascii
import gc
import hashlib
import os
import struct

from micropython import const

from . import limits
from .files import FILE, STAGING, Filter, hexlify, kind, piece, write
from .paths import check_path, normalized
from .refusal import Refused

# Wheels are unpacked into this folder of the root.
ROOT = "lib"

# Windows to unpack with, as powers of two. Our publisher writes members for which 4 KiB are enough; others
# get up to deflate's 32 KiB if there is memory.
_LEAST = const(8)
_LITTLE = const(128)
_USUAL = const(12)
_MOST = const(15)

_LOCAL = const(0x04034B50)
_CENTRAL = const(0x02014B50)
_END = b"PK\5\6"
_STORED = const(0)
_DEFLATED = const(8)
_RECORD = b".dist-info/RECORD"


# Where memory is short, keeps free what unpacking needs in one piece, while modules and names take their many
# small ones.
place = None


def hold(size):
    """Keeps so many bytes free in one piece, or nearly so many; 0 frees them."""
    global place
    place = None
    while size > 1 << _USUAL:
        try:
            place = bytearray(size)
            break
        except MemoryError:
            # The window needs one piece; the tables may find another.
            size -= 512


class BadWheel(Exception):
    """What is wrong with a wheel, as text."""


class Escapes(Exception):
    """A path in a wheel that leads out of the root."""


def unpack(root, entry, have, add):
    """Calls `add(path, digest)` for each file of the wheel of `entry`, its path relative to the device's
    root. Those for which `have(path, digest)` is not true have been written to staging, verified."""
    archive = None
    try:
        archive = Archive(root + STAGING + "/" + entry["pkg_sha256"])
        _unpack(archive, root, entry, have, add)
    except BadWheel as error:
        raise Refused("bad-wheel", "wheel `%s`: %s" % (entry["name"], error))
    except Escapes as error:
        raise Refused("escapes-root", "wheel `%s`: %s" % (entry["name"], error))
    finally:
        if archive:
            archive.close()


def _unpack(archive, root, entry, have, add):
    record = archive.record
    part = root + STAGING + "/" + entry["pkg_sha256"] + ".part"
    _extract_text(archive, record[:-6] + "METADATA", part)
    with open(part, "rb") as file:
        _check_metadata(file, entry)
    found = _extract_text(archive, record, part)
    os.rename(part, root + STAGING + "/" + found)
    room = limits.WHEEL_UNPACKED
    with open(root + STAGING + "/" + found, "rb") as file:
        for path, digest, size in record_lines(file):
            if digest is None:
                if path != record:
                    raise BadWheel("RECORD has no digest for `%s`" % path)
                digest = found
            target = ROOT + "/" + path
            try:
                check_path(target)
            except ValueError as error:
                raise Escapes(str(error))
            if not archive.find(path):
                raise BadWheel("`%s` is in RECORD and not in the archive" % path)
            add(target, digest)
            if not have(target, digest):
                length, _ = archive.extract(part, digest, size, room)
                room -= length
                os.rename(part, root + STAGING + "/" + digest)


def _extract_text(archive, member, part):
    # -> the digest
    try:
        if archive.find(member):
            return archive.extract(part, None, None, limits.WHEEL_TEXT)[1]
    except BadWheel:
        pass
    raise BadWheel("`%s` is no text of at most %d bytes" % (member, limits.WHEEL_TEXT))


def _check_metadata(file, entry):
    # A device that installs something else than the list says would never see that it is up to date.
    name = version = None
    try:
        for key, value in header_lines(file):
            key = key.lower()
            if key == "name" and name is None:
                name = value
            elif key == "version" and version is None:
                version = value
    except UnicodeError:
        raise BadWheel("METADATA is no text")
    except ValueError as error:
        raise BadWheel("bad text: %s" % error)
    text = "METADATA says %s `%s`, the list says `%s`"
    if normalized(name or "") != normalized(entry["name"]):
        raise BadWheel(text % ("Name", name or "", entry["name"]))
    if version != entry["version"]:
        raise BadWheel(text % ("Version", version or "", entry["version"]))


class Archive:
    """A zip archive in a file: stored and deflated members, found by the central directory."""

    def __init__(self, path):
        self.head = bytearray(46)
        self.file = open(path, "rb")
        try:
            self._read_directory(os.stat(path)[6])
        except (BadWheel, OSError):
            self.file.close()
            raise

    def close(self):
        self.file.close()

    def _read_directory(self, size):
        end = self._find_end(size)
        here, there, count, length, self.start = struct.unpack("<HHxxHII", self.read(end + 4, 16))
        if here or there or self.start + length > end:
            raise _not_whole("its directory is not where it says")
        if count > limits.WHEEL_MEMBERS:
            raise BadWheel("%d members are more than %d" % (count, limits.WHEEL_MEMBERS))
        self.count = count
        self.rewind()
        records = 0
        names = Filter()
        for index in range(count):
            name = self.next(None)
            if name.endswith(_RECORD) and b"/" not in name[: -len(_RECORD)] and len(name) > len(_RECORD):
                records += 1
                record = name
            # Of two members of one name, nobody can say which is meant.
            if names.note(hexlify(hashlib.sha256(name).digest())):
                after, at = self.at, self.index
                self.rewind()
                for _ in range(index):
                    if self.next(name):
                        raise BadWheel("two members have the same name")
                self.at, self.index = after, at
        if records != 1:
            raise BadWheel("%d RECORD files instead of one" % records)
        self.record = _text(record)
        self.rewind()

    def _find_end(self, size):
        # The end record is the last 22 bytes, or stands before a comment of up to 64 KiB.
        end = size - 22
        least = max(0, end - 0xFFFF)
        while end >= least:
            start = max(least, end + 22 - len(piece))
            data = bytes(self.read(start, min(end + 22, size) - start))
            found = data.rfind(_END)
            while found >= 0:
                at = start + found
                if at + 22 <= size and struct.unpack("<H", self.read(at + 20, 2))[0] == size - at - 22:
                    return at
                found = data.rfind(_END, 0, found)
            if start == least:
                break
            end = start - 19
        raise _not_whole("it has no end")

    def read(self, at, length):
        self.file.seek(at)
        return self.more(length)

    def more(self, length):
        view = piece[:length]
        if self.file.readinto(view) != length:
            raise _not_whole("it ends early")
        return view

    def rewind(self):
        self.at, self.index = self.start, 0

    def next(self, wanted):
        # Reads the next member of the directory. Its name, or None if it is not the one wanted.
        if self.index == self.count:
            self.rewind()
        self.index += 1
        self.file.seek(self.at)
        head = self.head
        if self.file.readinto(head) != 46 or struct.unpack_from("<I", head)[0] != _CENTRAL:
            raise _not_whole("its directory is damaged")
        length, extra, comment = struct.unpack_from("<HHH", head, 28)
        self.at += 46 + length + extra + comment
        if length > limits.LINE:
            raise _not_whole("a name is too long")
        if wanted is not None and len(wanted) != length:
            return None
        name = self.file.read(length)
        return name if wanted is None or wanted == name else None

    def find(self, name):
        """Goes to a member. -> whether there is one of that name"""
        wanted = name.encode()
        # Members mostly stand in the order in which RECORD names them.
        for _ in range(self.count):
            if self.next(wanted):
                self.name = name
                return True
        return False

    def windows(self):
        """The windows to try for the member, smallest first."""
        size = struct.unpack_from("<I", self.head, 24)[0]
        need = _LEAST
        while need < _MOST and size > 1 << need:
            need += 1
        return [need] if need <= _USUAL else [_USUAL, need]

    def open(self, window):
        """The member's content, as a stream."""
        flags, method = struct.unpack_from("<HH", self.head, 8)
        at = struct.unpack_from("<I", self.head, 42)[0]
        local, length, extra = struct.unpack("<I22xHH", self.read(at, 30))
        if local != _LOCAL:
            raise BadWheel("cannot unpack `%s`: it is not where the directory says" % self.name)
        if flags & 1 or method not in (_STORED, _DEFLATED):
            raise BadWheel("cannot unpack `%s`: it is neither stored nor deflated" % self.name)
        self.file.seek(at + 30 + length + extra)
        if method == _DEFLATED:
            return _inflate(self.file, window)
        return _Stored(self.file, struct.unpack_from("<I", self.head, 20)[0])

    def extract(self, part, digest, size, room):
        """Writes the member to the file `part`: `size` bytes if that is known, at most `room`, with `digest`
        if that is known. -> its size and digest. Where it raises, there is no file."""
        windows = self.windows()
        while True:
            window = windows.pop(0)
            try:
                return self._extract(part, digest, size, room, window)
            except BadWheel:
                # Perhaps a larger window is all it needs.
                _remove(part)
                if not windows or struct.unpack_from("<H", self.head, 10)[0] == _STORED:
                    raise
            except MemoryError:
                _remove(part)
                raise Refused(
                    "no-memory", "`%s` is packed with a window of %d bytes" % (self.name, 1 << window)
                )
            except OSError:
                _remove(part)
                raise

    def _extract(self, part, digest, size, room, window):
        held = place is not None
        hold(0)
        gc.collect()
        hasher = hashlib.sha256()
        crc = length = 0
        try:
            stream = self.open(window)
            with open(part, "wb") as out:
                while True:
                    try:
                        count = stream.readinto(piece)
                    except (OSError, EOFError, ValueError) as error:
                        raise BadWheel("cannot unpack `%s`: %s" % (self.name, error))
                    if not count:
                        break
                    length += count
                    if length > room:
                        raise BadWheel("it unpacks to more than %d bytes" % limits.WHEEL_UNPACKED)
                    if size is not None and length > size:
                        break
                    view = piece[:count]
                    hasher.update(view)
                    if hasattr(binascii, "crc32"):
                        crc = binascii.crc32(view, crc)
                    write(out, view)
                out.flush()
        finally:
            if held:
                # Now: what is to stay of this member should not lie where its window was.
                stream = None
                gc.collect()
                hold(limits.INFLATE)
        if size is not None and length != size:
            raise BadWheel("`%s` does not have the %d bytes that RECORD says" % (self.name, size))
        found = hexlify(hasher.digest())
        if digest is not None and found != digest:
            raise BadWheel("`%s` does not have the digest that RECORD says" % self.name)
        if hasattr(binascii, "crc32") and crc & 0xFFFFFFFF != struct.unpack_from("<I", self.head, 16)[0]:
            raise BadWheel("cannot unpack `%s`: its checksum is wrong" % self.name)
        return length, found


class _Stored:
    # So many bytes of a file.
    def __init__(self, file, size):
        self.file = file
        self.left = size

    def readinto(self, view):
        if self.left < len(view):
            view = view[: self.left]
        count = self.file.readinto(view) if self.left else 0
        self.left -= count
        return count


def _inflate(file, window):
    try:
        from deflate import RAW, DeflateIO
    except ImportError:
        # MicroPython 1.20.
        from zlib import DecompIO

        return DecompIO(file, -window)
    return DeflateIO(file, RAW, window)


def _remove(path):
    if kind(path) == FILE:
        os.remove(path)


def _not_whole(why):
    return BadWheel("not a whole zip archive: " + why)


def record_lines(file):
    """The lines of a RECORD in `file`: (path, digest or None, size or None). Raises `BadWheel` and
    `Escapes`."""
    number = 0
    paths = Filter()
    while True:
        start = file.tell()
        line = _line(file)
        if not line:
            return
        number += 1
        text = _without_end(line)
        if not text:
            continue
        try:
            path, digest, size = _record_line(_text(text))
        except (ValueError, IndexError, TypeError):
            raise BadWheel("bad text: RECORD line %d: `%s` is not `path,hash,size`" % (number, _show(text)))
        try:
            check_path(path)
        except ValueError as error:
            raise Escapes("RECORD line %d: %s" % (number, error))
        if paths.note(hexlify(hashlib.sha256(path.encode()).digest())) and _has_path(file, start, path):
            raise BadWheel("bad text: RECORD line %d: `%s` is in an earlier line, too" % (number, path))
        yield path, digest, size


def _has_path(file, end, path):
    # Whether a line before `end` names `path`.
    after = file.tell()
    file.seek(0)
    found = False
    while not found and file.tell() < end:
        text = _without_end(_line(file))
        found = bool(text) and _record_line(_text(text))[0] == path
    file.seek(after)
    return found


def _record_line(text):
    if text.startswith('"'):
        path = ""
        rest = text[1:]
        while True:
            end = rest.index('"')
            path += rest[:end]
            rest = rest[end + 1 :]
            if not rest.startswith('"'):
                break
            path += '"'
            rest = rest[1:]
        if not rest.startswith(","):
            raise ValueError
        rest = rest[1:]
    else:
        comma = text.index(",")
        path, rest = text[:comma], text[comma + 1 :]
    comma = rest.index(",")
    digest, size = rest[:comma], rest[comma + 1 :]
    if size.strip("0123456789"):
        raise ValueError
    size = int(size) if size else None
    if size is not None and size >> 64:
        raise ValueError
    return path, _digest(digest), size


def _digest(text):
    if not text:
        return None
    if not text.startswith("sha256="):
        raise ValueError
    text = text[7:].rstrip("=")
    if "+" in text or "/" in text:
        raise ValueError
    text = text.replace("-", "+").replace("_", "/")
    data = binascii.a2b_base64(text + "=" * (-len(text) % 4))
    # Written again it is the same, or some bits meant nothing.
    if len(data) != 32 or binascii.b2a_base64(data).rstrip(b"\n=").decode() != text:
        raise ValueError
    return hexlify(data)


def header_lines(stream):
    """The headers of a METADATA or WHEEL: (key, value), up to the first blank line. What of a line is beyond
    `limits.LINE` is left out. Raises `ValueError` for a line that is no header."""
    key = None
    value = ""
    number = 0
    while True:
        line = more = _line(stream)
        while len(more) >= limits.LINE and not more.endswith(b"\n"):
            more = _line(stream)
        number += 1
        text = _text(_without_end(line))
        if not text:
            break
        # Of the bytes: a character of a text would be kept for ever.
        if line[0] in b" \t" and key is not None:
            text = text.strip()
            if len(value) + len(text) < limits.LINE:
                value += " " + text if value and text else text
            continue
        colon = text.find(":")
        name = text[:colon] if colon > 0 else " "
        if " " in name or "\t" in name:
            raise ValueError("line %d: `%s` is not `Key: value`" % (number, text))
        if key is not None:
            yield key, value
        key, value = name, text[colon + 1 :].strip()
    if key is not None:
        yield key, value


def _line(file):
    # The next line, or the next part of one that is longer than `limits.LINE`. By little: `readline` takes at
    # once what it may need at most.
    line = b""
    while len(line) < limits.LINE and not line.endswith(b"\n"):
        more = file.readline(_LITTLE)
        if not more:
            break
        line += more
    return line


def _without_end(line):
    if line.endswith(b"\n"):
        line = line[:-1]
        if line.endswith(b"\r"):
            line = line[:-1]
    return line


def _text(data):
    return data.decode()


def _show(data):
    try:
        return data.decode()
    except UnicodeError:
        return repr(data)[2:-1]
