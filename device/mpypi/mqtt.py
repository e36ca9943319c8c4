"""MQTT 3.1.1 on one connection: what a device needs, and nothing that needs the memory of a server.

A message is read in pieces of at most `limits.PIECE` bytes into one buffer that is made once, so a message
may be larger than the memory. Every wait has a limit. Whatever the broker sends that MQTT does not allow, or
that is beyond a limit, ends the connection with `Lost`; so does every error of the connection itself.

All of it is coroutines. Under asyncio they yield while they wait; given the `nap` of `blocking` they never
do.

Numbers in [] are the requirements of the MQTT 3.1.1 specification that a line is about.
"""

import time

from micropython import const

from . import limits
from .refusal import Lost

CONNACK = const(2)
PUBLISH = const(3)
PUBACK = const(4)
SUBACK = const(9)
UNSUBACK = const(11)
PINGRESP = const(13)

_PING = b"\xc0\x00"
_AGAIN = (11, 35)  # EAGAIN here and there


class Line:
    """One connection to a broker; after `Lost` or `close` it can be opened again."""

    def __init__(self, nap, view):
        self.nap = nap
        self.socket = None
        self.view = view  # of `limits.PIECE` bytes, for whatever comes and goes
        self.head = bytearray(4)
        self.filled = 0  # of the packet being written
        self._last_id = 0
        self.unacknowledged = 0  # messages of ours
        self.left = 0  # what is still to be read of the packet
        self.topic = None  # the message's
        self.retained = False
        self._acknowledge = 0
        self.answer = b""  # what a CONNACK or SUBACK says
        self._heard = self._said = 0  # when
        self._pinged = None  # when, if no answer came yet

    def start(self):
        """A new connection is being used."""
        self._heard = self._said = time.ticks_ms()
        self._pinged = None
        self.unacknowledged = 0

    def close(self):
        """Closes without a word; nothing happens if it is closed."""
        sock = self.socket
        self.socket = None
        self.left = self.filled = 0
        if sock:
            try:
                sock.close()
            except (OSError, ValueError):
                pass  # What could be closed is closed.

    def lost(self, error):
        """Closes, and returns what to raise."""
        self.close()
        if isinstance(error, ValueError):
            # What mbedTLS says about a certificate.
            hint = "is `ca` the CA that made its certificate, is it for this name, is this device's clock set?"
            return Lost("the broker cannot be trusted: " + " ".join(str(error).split()), hint)
        return Lost("lost the connection: %s" % error if isinstance(error, OSError) else error)

    # Reading

    async def next(self, wait):
        """Waits for a packet, at most `wait` ms. Returns its type, or 0 if there is none.

        Of a PUBLISH, `topic`, `retained` and `left` are set; what `left` counts is to be read by `piece` or
        `skip` first. Of a SUBACK, `answer` holds its number and its codes.
        """
        if self.left:
            await self.skip()
        head = memoryview(self.head)
        if not await self.fill(head[:1], wait, False):
            return 0
        kind, flags = head[0] >> 4, head[0] & 15
        left = await self._remaining()
        if kind == PUBLISH:
            await self._publish(flags, left)
            return kind
        # [MQTT-2.2.2-2]: the other packets that a client gets have no flags.
        sizes = {CONNACK: (2, 2), PUBACK: (2, 2), SUBACK: (3, 2 + 8), UNSUBACK: (2, 2), PINGRESP: (0, 0)}
        least, most = sizes.get(kind, (1, 0))
        if flags or not least <= left <= most:
            raise self.lost("the broker sent a packet that MQTT does not know, or that is no client's")
        await self.fill(self.view[:left], limits.READ)
        if kind == PUBACK:
            self.unacknowledged = max(0, self.unacknowledged - 1)
        else:
            self.answer = bytes(self.view[:left])
        return kind

    async def _remaining(self):
        """The length of what follows. [MQTT-2.2.3]: at most four bytes."""
        byte = memoryview(self.head)[1:2]
        left = shift = 0
        while True:
            await self.fill(byte, limits.READ)
            left |= (byte[0] & 0x7F) << shift
            shift += 7
            if not byte[0] & 0x80:
                break
            if shift > 21:
                raise self.lost("the broker sent a length that is none")
        if left > limits.PACKET:
            raise self.lost("the broker sent a packet of %d bytes, more than %d" % (left, limits.PACKET))
        return left

    async def _publish(self, flags, left):
        qos = flags >> 1 & 3
        # Nothing is subscribed to at QoS 2.
        if qos > 1:
            raise self.lost("the broker sent a message at QoS %d" % qos)
        short = memoryview(self.head)[2:4]
        if left < 2:
            raise self.lost("the broker sent a message without a topic")
        await self.fill(short, limits.READ)
        size = short[0] << 8 | short[1]
        left -= 2 + size + 2 * qos
        if left < 0 or not 0 < size <= limits.TOPIC:
            raise self.lost("the broker sent a message with a topic that is none")
        await self.fill(self.view[:size], limits.READ)
        try:
            self.topic = str(self.view[:size], "utf-8")
        except UnicodeError:
            raise self.lost("the broker sent a topic that is not UTF-8")
        self._acknowledge = 0
        if qos:
            await self.fill(short, limits.READ)
            self._acknowledge = short[0] << 8 | short[1]
            if not self._acknowledge:
                raise self.lost("the broker sent a message at QoS 1 without a number")
        self.retained = bool(flags & 1)
        self.left = left
        if not left:
            await self.done()

    async def piece(self):
        """The next piece of the message: a view that is good until the line is used again; empty at the
        end."""
        size = min(self.left, limits.PIECE)
        view = self.view[:size]
        if size:
            await self.nap(0)
            await self.fill(view, limits.READ)
            self.left -= size
            if not self.left:
                await self.done()
        return view

    async def skip(self):
        """Reads what is left of the message."""
        while self.left:
            await self.piece()

    async def done(self):
        if self._acknowledge:
            # Not through the buffer: the last piece is in it.
            await self.write(bytes([0x40, 2, self._acknowledge >> 8, self._acknowledge & 0xFF]), limits.WRITE)
            self._acknowledge = 0

    async def fill(self, view, wait, needed=True):
        """Reads until `view` is full. Says whether it is; it must be, within `wait` ms, if it is `needed` or
        begun."""
        at, size, pause = 0, len(view), 1
        since = time.ticks_ms()
        while at < size:
            if self.socket is None:
                raise Lost("there is no connection")
            try:
                got = self.socket.readinto(view[at:] if at else view)
            except OSError as error:
                if error.errno not in _AGAIN:
                    raise self.lost(error)
                got = None
            except ValueError as error:
                raise self.lost(error)
            if got:
                at += got
                pause = 1
                self._heard = time.ticks_ms()
                continue
            if got == 0:
                raise self.lost("the broker closed the connection")
            now = time.ticks_ms()
            waited = time.ticks_diff(now, since)
            if waited >= wait:
                if at or needed:
                    raise self.lost("the broker said nothing for %d ms in the middle of a packet" % waited)
                return False
            await self._keep_alive(now)
            await self.nap(min(pause, max(1, wait - waited)))
            pause = min(2 * pause, limits.NAP_MOST)
        return True

    async def _keep_alive(self, now):
        if self._pinged is not None:
            if time.ticks_diff(self._heard, self._pinged) >= 0:
                self._pinged = None
            elif time.ticks_diff(now, self._pinged) > limits.PONG:
                raise self.lost("the broker did not answer a ping")
        elif time.ticks_diff(now, self._said) > limits.KEEP_ALIVE * 500:
            self._pinged = now
            await self.write(_PING, limits.WRITE)

    # Writing: a packet is put together in the buffer, and written whenever that is full.

    def begin(self, first, size):
        view, at = self.view, 1
        view[0] = first
        while True:
            view[at] = size & 0x7F | (0x80 if size > 0x7F else 0)
            at += 1
            size >>= 7
            if not size:
                break
        self.filled = at

    async def put(self, data):
        at, size = 0, len(data)
        while at < size:
            if self.filled == limits.PIECE:
                await self.send()
            part = min(size - at, limits.PIECE - self.filled)
            self.view[self.filled : self.filled + part] = data[at : at + part]
            self.filled += part
            at += part

    async def put_text(self, text):
        await self.put(bytes([len(text) >> 8, len(text) & 0xFF]))
        await self.put(text)

    async def send(self, wait=limits.WRITE):
        size, self.filled = self.filled, 0
        await self.write(self.view[:size], wait)

    async def write(self, data, wait):
        at, size, pause = 0, len(data), 1
        since = time.ticks_ms()
        while at < size:
            if self.socket is None:
                raise Lost("there is no connection")
            try:
                took = self.socket.write(data[at:] if at else data)
            except OSError as error:
                if error.errno not in _AGAIN:
                    raise self.lost(error)
                took = None
            except ValueError as error:
                raise self.lost(error)
            if took:
                at += took
                pause = 1
                continue
            waited = time.ticks_diff(time.ticks_ms(), since)
            if waited >= wait:
                raise self.lost("the broker took nothing for %d ms" % waited)
            await self.nap(pause)
            pause = min(2 * pause, limits.NAP_MOST)
        self._said = time.ticks_ms()

    def _number(self):
        self._last_id = self._last_id % 0xFFFF + 1
        return bytes([self._last_id >> 8, self._last_id & 0xFF])

    async def publish(self, topic, payload, retain=True, qos=1):
        """Publishes. `payload` is bytes, or their number and what yields them in pieces."""
        topic = topic.encode()
        size, pieces = (len(payload), (payload,)) if isinstance(payload, bytes) else payload
        self.begin(0x30 | qos << 1 | retain, 2 + len(topic) + 2 * qos + size)
        await self.put_text(topic)
        if qos:
            await self.put(self._number())
            self.unacknowledged += 1
        for piece in pieces:
            size -= len(piece)
            if size >= 0:
                await self.put(piece)
        if size:
            # What was said to come is not what came: the broker would take the next packet for the rest.
            raise self.lost("a message changed while it was sent")
        await self.send()

    async def subscribe(self, topics, qos):
        """Subscribes to `topics`. Returns the number that the broker's answer has."""
        return await self._ask(0x82, topics, qos)

    async def unsubscribe(self, topics):
        """Ends subscriptions."""
        return await self._ask(0xA2, topics, b"")

    async def _ask(self, first, topics, options):
        self.begin(first, 2 + sum([2 + len(topic.encode()) + len(options) for topic in topics]))
        await self.put(self._number())
        for topic in topics:
            await self.put_text(topic.encode())
            await self.put(options)
        await self.send()
        return self._last_id

    async def leave(self, topic):
        """Says `0` on `topic`, waits until the broker has it all, and disconnects; within
        `limits.GOODBYE`."""
        try:
            await self.publish(topic, b"0")
            since = time.ticks_ms()
            while self.unacknowledged:
                wait = limits.GOODBYE - time.ticks_diff(time.ticks_ms(), since)
                if wait <= 0 or not await self.next(wait):
                    break
            await self.write(b"\xe0\x00", limits.GOODBYE)
        except Lost:
            pass  # The broker notices by itself.
        self.close()
