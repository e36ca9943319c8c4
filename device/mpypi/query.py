"""Which devices a rollout is for: the language and the rules of protocol/src/query.rs, read and answered in one
go."""

from . import bounds

_SPACE = b" \t\r\n"
_STOPS = b" \t\r\n'\"()=!<>~"
_FIELDS = ("node", "runtime", "channel", "version", "sequence", "agent", "firmware")


def holds(text, fact):
    """Whether a query holds for a device of which `fact(field)` says a text, or `None` where it says nothing.
    With `fact` `None` it is only read. Raises `ValueError` where it is none."""
    data = text.encode()
    if len(data) > bounds.QUERY:
        raise ValueError("a query of %d bytes is longer than %d" % (len(data), bounds.QUERY))
    query = _Query(data, fact)
    found = query.any(0)
    if query.token is not None:
        query.expected("`and`, `or` or the end")
    return found


class _Query:
    def __init__(self, data, fact):
        self.data = data
        self.fact = fact
        self.at = 0
        self.next()

    def next(self):
        """Goes on to the next token: `token` is its bytes, those of a text in quotes with the first of these
        before; `None` at the end."""
        data, at = self.data, self.at
        while at < len(data) and data[at] in _SPACE:
            at += 1
        self.start = at
        end = at + 1
        if at == len(data):
            self.token = None
            return
        if data[at] in b"'\"":
            end = data.find(data[at : at + 1], end) + 1
            if not end:
                raise ValueError("the text in quotes at %d does not end" % at)
            self.token = data[at : end - 1]
        else:
            if data[at] in b"!<>" and data[end : end + 1] == b"=":
                end += 1
            elif data[at] not in _STOPS:
                while end < len(data) and data[end] not in _STOPS:
                    end += 1
            self.token = data[at:end]
        self.at = end

    def expected(self, what):
        found = "`%s`" % self.token.decode() if self.token else "the end"
        raise ValueError("%s should be at %d, not %s" % (what, self.start, found))

    def any(self, depth):
        found = self.all(depth)
        while self.token == b"or":
            self.next()
            # What is on the right is read in any case.
            found = self.all(depth) or found
        return found

    def all(self, depth):
        found = self.one(depth)
        while self.token == b"and":
            self.next()
            found = self.one(depth) and found
        return found

    def one(self, depth):
        token = self.token
        if token == b"not" or token == b"(":
            if depth == bounds.QUERY_DEPTH:
                raise ValueError("more than %d levels at %d" % (depth, self.start))
            self.next()
            if token == b"not":
                return not self.one(depth + 1)
            found = self.any(depth + 1)
            if self.token != b")":
                self.expected("`)`")
            self.next()
            return found
        if not self.is_word():
            self.expected("a field, `not` or `(`")
        field = token.decode()
        if field not in _FIELDS and not (field.startswith("label.") and len(field) > 6):
            names = ", ".join(_FIELDS[:-1])
            raise ValueError("`%s` is no field: use %s, firmware or `label.<name>`" % (field, names))
        self.next()
        operator = self.token
        if operator not in (b"=", b"!=", b"<", b"<=", b">", b">=", b"~"):
            self.expected("one of `= != < <= > >= ~`")
        self.next()
        value = self.token
        if not self.is_word():
            if not value or value[:1] not in b"'\"":
                self.expected("a value")
            value = value[1:]
        self.next()
        found = self.fact(field) if self.fact else None
        return found is not None and _compare(found.encode(), operator, value)

    def is_word(self):
        token = self.token
        return bool(token) and token[0] not in _STOPS and token not in (b"and", b"or", b"not")


def _compare(one, operator, other):
    if operator == b"~":
        return _matches(one.decode(), other.decode())
    first, rest = _numbers(one)
    second, more = _numbers(other)
    order = (one > other) - (one < other)
    if first and second and (operator[0] in b"<>" or not rest and not more):
        # PEP 440: release segments compare number by number, the shorter filled up with zeros.
        size = max(len(first), len(second))
        first += [0] * (size - len(first))
        second += [0] * (size - len(second))
        order = (first > second) - (first < second)
    if operator == b"=" or operator == b"!=":
        return (order == 0) == (operator == b"=")
    return order < 0 and operator[0] == 60 or order > 0 and operator[0] == 62 or order == 0 and len(operator) == 2


def _numbers(text):
    """The numbers joined by dots that a text begins with, and what follows them."""
    at = 1 if text[:1] == b"v" else 0
    found = []
    while True:
        end = at
        if found and text[at : at + 1] == b".":
            end += 1
        elif found:
            break
        start = end
        while end < len(text) and 48 <= text[end] <= 57:
            end += 1
        if end == start:
            break
        found.append(int(text[start:end].decode()))
        at = end
    return found, text[at:]


def _matches(text, pattern):
    """Whether all of `text` is as `pattern` says. At a mismatch only the last `*` takes one character more, so
    the time is bounded by the product of the lengths."""
    t = p = 0
    star = None
    while t < len(text):
        if p < len(pattern) and pattern[p] == "*":
            star, taken = p, t
            p += 1
        elif p < len(pattern) and (pattern[p] == "?" or pattern[p] == text[t]):
            p += 1
            t += 1
        elif star is not None:
            taken += 1
            p, t = star + 1, taken
        else:
            return False
    return not pattern[p:].strip("*")
