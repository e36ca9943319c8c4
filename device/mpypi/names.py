"""What a device, its channel and its broker are called: protocol/src/topic.rs and address.rs."""

import sys

from . import limits
from .paths import has_control
from .words import channel_problem


def channel(name):
    """The name of a channel, checked."""
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
    data = name.encode()
    good = 0 < len(data) <= limits.NODE_NAME and not has_control(data)
    for byte in b"/+#":
        good = good and byte not in data
    if not good:
        text = "`%s` is no node name: use 1 to %d bytes without `/`, `+`, `#` and control characters"
        raise ValueError(text % (name[:80], limits.NODE_NAME))
    return name


def server(url, user, password, ca):
    """Where a broker is, `mqtt://[user[:password]@]host[:port]`, or `mqtts://` for TLS.

    -> (host, port, whether to use TLS, user, password)
    """
    scheme, mark, place = url.partition("://")
    if not mark or scheme not in ("mqtt", "tcp", "mqtts", "ssl"):
        raise ValueError("`server` does not start with `mqtt://` or `mqtts://`")
    secure = scheme in ("mqtts", "ssl")
    if secure and not ca:
        raise ValueError("`mqtts://` needs `ca`, the file of the CA that made the broker's certificate")
    login, mark, place = (place[:-1] if place.endswith("/") else place).rpartition("@")
    if mark:
        user, mark, word = login.partition(":")
        user = _decoded(user)
        password = _decoded(word) if mark else password
    if place.startswith("["):
        host, _, port = place[1:].partition("]")
        mark, port = port[:1], port[1:]
    else:
        host, mark, port = place.partition(":")
    try:
        number = int(port) if mark else 8883 if secure else 1883
    except ValueError:
        number = 0
    if not host or not 0 < number < 65536 or mark not in ("", ":"):
        raise ValueError("`server` names no host, or no port, that can be")
    return host, number, secure, user, password


def _decoded(text):
    parts = text.split("%")
    whole = parts[0].encode()
    for part in parts[1:]:
        whole += bytes([int(part[:2], 16)]) + part[2:].encode()
    return str(whole, "utf-8")
