"""JSON from a file, token by token. What is skipped is not held against all of its grammar: see `lists`."""

from . import limits
from .refusal import Refused


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
                    raise bad("not JSON: `%s`" % _show(text))
            if not text or text[0] not in b"-0123456789":
                raise bad("not JSON: a value is missing")
        return text

    def place(self):
        """Where in the file the next byte is."""
        return self.file.tell() - self.end + self.at

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


def _show(text):
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
        raise bad("not JSON: `%s` is no text" % _show(text))


def is_whole(digits):
    """Whether a number is a whole one of at most 64 bits."""
    for digit in digits:
        if digit not in b"0123456789":
            return False
    return len(digits) <= 20 and (digits == b"0" or digits[0] != 48) and int(digits) < 1 << 64
