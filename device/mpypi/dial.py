"""Getting through to a broker: its address, TCP, TLS, and CONNECT. Needed only until there is a
connection."""

import errno
import select
import socket
import time

from . import limits
from .agent import buffer
from .mqtt import CONNACK, Line
from .refusal import Lost

# What a socket says whose connection is being made: Linux, lwIP, and lwIP on older ESP32 builds.
_CONNECTING = (errno.EINPROGRESS, 36, 115, 118, 119)
_REASONS = (
    "",
    "it does not speak MQTT 3.1.1",
    "it does not accept this node's name",
    "it is not available",
    "it wants another user name or password",
    "it wants another user name or password",
)


async def run(agent):
    """Connects, and logs in with a session of its own and the will `0`, retained."""
    host, port, secure = agent.server[:3]
    agent.hang_up()
    agent.since = 0
    line = agent.line = Line(agent.nap, memoryview(buffer))
    try:
        places = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)
    except OSError as error:
        raise Lost("cannot find `%s`: %s" % (host, error))
    trouble = "it has no address"
    for place in places:
        try:
            line.socket = socket.socket(place[0], socket.SOCK_STREAM)
            await _connect(line, place[-1])
            break
        except OSError as error:
            trouble = error
            line.close()
    else:
        raise Lost("cannot reach `%s` port %d: %s" % (host, port, trouble), "is there a broker?")
    if secure:
        _secure(line, host, *agent.trust)
    await _greet(agent, line, *agent.server[3:])
    if agent.servers:
        agent.servers[0] = True
    return "greet"


async def _connect(line, address):
    line.socket.setblocking(False)
    try:
        line.socket.connect(address)
    except OSError as error:
        if error.errno not in _CONNECTING:
            raise
    poll = select.poll()
    poll.register(line.socket, select.POLLOUT)
    since = time.ticks_ms()
    while True:
        ready = poll.poll(0)
        if ready:
            if ready[0][1] & (select.POLLERR | select.POLLHUP):
                raise OSError(errno.ECONNREFUSED)
            return
        if time.ticks_diff(time.ticks_ms(), since) > limits.CONNECT:
            raise OSError(errno.ETIMEDOUT)
        await line.nap(limits.NAP_MOST)


def _secure(line, host, ca, cert, key):
    """Makes the socket a TLS one that believes nobody but who `ca` vouches for, under the name that was asked
    for.

    The handshake comes with the first bytes: there it has its limit.
    """
    try:
        import ssl

        if hasattr(ssl, "SSLContext"):
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.verify_mode = ssl.CERT_REQUIRED
            for der in ders(ca):
                context.load_verify_locations(cadata=der)
            if cert:
                context.load_cert_chain(ders(cert)[0], ders(key)[0])
            line.socket = context.wrap_socket(
                line.socket, server_hostname=host, do_handshake_on_connect=False
            )
        else:
            # MicroPython before 1.21.
            more = {"cert": ders(cert)[0], "key": ders(key)[0]} if cert else {}
            line.socket = ssl.wrap_socket(
                line.socket,
                server_hostname=host,
                cert_reqs=ssl.CERT_REQUIRED,
                cadata=ders(ca)[0],
                do_handshake=False,
                **more
            )
    except (AttributeError, ImportError, TypeError):
        line.close()
        hint = "use one with mbedTLS, or `mqtt://`"
        raise Lost("this build of MicroPython cannot check certificates", hint)
    except (OSError, ValueError) as error:
        raise line.lost(error)


def ders(path):
    """What a file holds in DER: as it is, or each part of a PEM file, which not every build reads."""
    with open(path, "rb") as file:
        data = file.read()
    if b"-----BEGIN" not in data:
        return [data]
    import binascii

    parts = []
    for part in data.split(b"-----BEGIN ")[1:]:
        # Up to `-----` is the label; an EC key may have its parameters in front.
        label, _, rest = part.partition(b"-----")
        if label != b"EC PARAMETERS":
            parts.append(binascii.a2b_base64(rest.partition(b"-----")[0]))
    return parts


async def _greet(agent, line, user, password):
    flags = 0x02 | 0x04 | 0x08 | 0x20  # a clean session; a will, at QoS 1, retained
    texts = [agent.node, agent.topics[1] + "online", "0"]
    if user is not None:
        flags |= 0x80
        texts.append(user)
        if password is not None:
            flags |= 0x40
            texts.append(password)
    texts = [text.encode() for text in texts]
    line.begin(0x10, 10 + sum([2 + len(text) for text in texts]))
    await line.put(b"\x00\x04MQTT\x04" + bytes([flags, limits.KEEP_ALIVE >> 8, limits.KEEP_ALIVE & 0xFF]))
    for text in texts:
        await line.put_text(text)
    line.start()
    await line.send(limits.HANDSHAKE)
    if await line.next(limits.HANDSHAKE) != CONNACK:
        raise line.lost("the broker does not answer as one")
    code = line.answer[1]
    if code:
        line.close()
        reason = _REASONS[code] if code < len(_REASONS) else "it says %d" % code
        hint = "give another `node`" if code == 2 else "give `user` and `password`" if code > 3 else None
        raise Lost("the broker refused the connection: " + reason, hint)
