"""What a device, its channel and its broker are called: protocol/src/topic.rs and address.rs."""

import sys

from . import limits


def channel(name):
    """The name of a channel, checked."""
    from .paths import channel_problem

    problem = channel_problem(name)
    if problem:
        raise ValueError(problem)
    return name


def node(name):
    """The name of a device, checked; one that was given none is called by its platform and its chip's id."""
    if name is None:
        try:
            import machine
            from binascii import hexlify

            name = sys.platform + "-" + hexlify(machine.unique_id()).decode()
        except (ImportError, AttributeError):
            raise ValueError("this device has no id of its own: give `node`")
    good = 0 < len(name.encode()) <= limits.NODE_NAME
    for char in name:
        good = good and char not in "/+#" and ord(char) >= 32 and not 127 <= ord(char) < 160
    if not good:
        text = "`%s` is no node name: use 1 to %d bytes without `/`, `+`, `#` and control characters"
        raise ValueError(text % (name[:80], limits.NODE_NAME))
    return name


class Server:
    """Where a broker is: `mqtt://[user[:password]@]host[:port]`, or `mqtts://` for TLS."""

    def __init__(self, url, user=None, password=None, ca=None, cert=None, key=None):
        scheme, mark, place = url.partition("://")
        if not mark or scheme not in ("mqtt", "tcp", "mqtts", "ssl"):
            raise ValueError("`server` does not start with `mqtt://` or `mqtts://`")
        self.secure = scheme in ("mqtts", "ssl")
        self.ca, self.cert, self.key = ca, cert, key
        login, mark, place = (place[:-1] if place.endswith("/") else place).rpartition("@")
        if mark:
            name, mark, word = login.partition(":")
            user = _decoded(name)
            password = _decoded(word) if mark else password
        self.user, self.password = user, password
        if place.startswith("["):
            host, _, port = place[1:].partition("]")
            mark, port = port[:1], port[1:]
        else:
            host, mark, port = place.partition(":")
        self.host = host
        try:
            self.port = int(port) if mark else 8883 if self.secure else 1883
        except ValueError:
            self.port = 0
        if not host or not 0 < self.port < 65536 or mark not in ("", ":"):
            raise ValueError("`server` names no host, or no port, that can be")
        if self.secure and not ca:
            raise ValueError("`mqtts://` needs `ca`, the file of the CA that made the broker's certificate")


def _decoded(text):
    parts = text.split("%")
    whole = parts[0].encode()
    for part in parts[1:]:
        whole += bytes([int(part[:2], 16)]) + part[2:].encode()
    return str(whole, "utf-8")
