"""MQTT packets as a judge sees them: what a broker said, beside what it was expected to say.

A suite that was written beside one broker expects that broker's bytes, also where the standard leaves a
choice. Here two packets are the same if they differ only in such a choice:

- the limits that a CONNACK announces (what a client must keep to, not what it is told about itself);
- a reason string or user properties in an answer (MQTT 5, 3.4.2.2.2 and its like: for people);
- a reason code and property length left out where they say success (3.4.2.1, 2.2.2.1);
- which code for what is wrong a DISCONNECT gives: malformed packet, protocol error, or what exactly was wrong
  with a topic (4.13.1: it SHOULD say which; suites and brokers draw the line differently);
- 0x00 for 0x10, which a server MAY say to a message without subscribers (3.4.2.1, table 3-4);
- the order of properties other than user properties (2.2.2.2);
- the packet ids a broker chooses (2.2.1), as long as one message keeps its id;
- whether the answer to a client's message or a message for it comes first (4.6 orders each, not both).
"""

import dataclasses
import struct

CONNECT, CONNACK, PUBLISH, PUBACK, PUBREC, PUBREL, PUBCOMP = range(1, 8)
SUBSCRIBE, SUBACK, UNSUBSCRIBE, UNSUBACK, PINGREQ, PINGRESP, DISCONNECT, AUTH = range(8, 16)
NAMES = (
    "reserved CONNECT CONNACK PUBLISH PUBACK PUBREC PUBREL PUBCOMP "
    "SUBSCRIBE SUBACK UNSUBSCRIBE UNSUBACK PINGREQ PINGRESP DISCONNECT AUTH"
).split()

ANSWERS = {PUBACK, PUBREC, PUBCOMP}
REASON_STRING, USER_PROPERTY = 0x1F, 0x26
# Session expiry, receive and alias maximum, maximum QoS, retain available, maximum packet size, wildcards,
# subscription identifiers, shared subscriptions: 3.2.2.3.
ANNOUNCED = {0x11, 0x21, 0x22, 0x24, 0x25, 0x27, 0x28, 0x29, 0x2A}

# Malformed packet, protocol error, topic filter invalid, topic name invalid: 4.13.1.
WRONG = {0x81, 0x82, 0x8F, 0x90}

_BYTE = {0x01, 0x17, 0x19, 0x24, 0x25, 0x28, 0x29, 0x2A}
_TWO = {0x13, 0x21, 0x22, 0x23}
_FOUR = {0x02, 0x11, 0x18, 0x27}
_DATA = {0x03, 0x08, 0x09, 0x12, 0x15, 0x16, 0x1A, 0x1C, 0x1F}


class Malformed(Exception):
    """A broker sent what is no MQTT packet."""


class Closed(Exception):
    """The broker has closed the connection."""


@dataclasses.dataclass
class Packet:
    """A packet that a broker sends."""

    first: int
    fields: dict
    raw: bytes

    @property
    def type(self):
        return self.first >> 4

    def __str__(self):
        fields = ", ".join(f"{name} {value}" for name, value in self.fields.items())
        return f"{NAMES[self.type]} {self.first & 15:#x} ({fields}) {self.raw[:64].hex(' ')}"


class Reader:
    """Bytes of a packet, taken from the front."""

    def __init__(self, body):
        self.body = body

    def take(self, count):
        if count > len(self.body):
            raise Malformed(f"{count} bytes expected, {len(self.body)} left")
        part, self.body = self.body[:count], self.body[count:]
        return part

    def number(self, size):
        return int.from_bytes(self.take(size), "big")

    def variable(self):
        value = shift = 0
        while True:
            byte = self.number(1)
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 21:
                raise Malformed("a length of more than four bytes")

    def data(self):
        return self.take(self.number(2))

    def properties(self):
        """Pairs of id and value, in order."""
        block, found = Reader(self.take(self.variable())), []
        while block.body:
            name = block.variable()
            if name in _BYTE:
                value = block.number(1)
            elif name in _TWO:
                value = block.number(2)
            elif name in _FOUR:
                value = block.number(4)
            elif name == 0x0B:
                value = block.variable()
            elif name in _DATA:
                value = block.data()
            elif name == USER_PROPERTY:
                value = (block.data(), block.data())
            else:
                raise Malformed(f"property {name:#x}")
            found.append((name, value))
        return found


def split(data):
    """The packets that `data` begins with, and what is left of it."""
    packets = []
    while True:
        reader = Reader(data[1:])
        try:
            size = reader.variable()
            body = reader.take(size)
        except Malformed:
            if len(data) > 5 and all(byte & 128 for byte in data[1:5]):
                raise
            return packets, data
        end = len(data) - len(reader.body)
        packets.append((data[0], body, data[:end]))
        data = data[end:]


def decode(first, body, raw, version):
    """Parses what a broker sends. Raises `Malformed`."""
    reader, five, kind = Reader(body), version == 5, first >> 4
    fields = {}
    if kind == PUBLISH:
        fields["topic"] = reader.data()
        if first & 6:
            fields["id"] = reader.number(2)
        if five:
            fields["properties"] = reader.properties()
        fields["payload"], reader.body = reader.body, b""
    elif kind == CONNACK:
        fields["session"], fields["reason"] = reader.number(1), reader.number(1)
        if five:
            fields["properties"] = reader.properties()
    elif kind in (PUBACK, PUBREC, PUBREL, PUBCOMP):
        fields["id"] = reader.number(2)
        fields["reason"] = reader.number(1) if five and reader.body else 0
        fields["properties"] = reader.properties() if five and reader.body else []
    elif kind in (SUBACK, UNSUBACK):
        fields["id"] = reader.number(2)
        if five:
            fields["properties"] = reader.properties()
        fields["reasons"], reader.body = list(reader.body), b""
    elif kind in (DISCONNECT, AUTH):
        if not five:
            raise Malformed(f"a {NAMES[kind]} from a broker, in MQTT 3")
        fields["reason"] = reader.number(1) if reader.body else 0
        fields["properties"] = reader.properties() if reader.body else []
    elif kind != PINGRESP:
        raise Malformed(f"a {NAMES[kind]} from a broker")
    if reader.body:
        raise Malformed(f"{len(reader.body)} bytes too many in a {NAMES[kind]}")
    return Packet(first, fields, raw)


def difference(expected, received, ids):
    """What is wrong with `received`, or nothing. `ids` maps expected to chosen packet ids, and is kept."""
    if expected.first != received.first:
        return "another packet, or other flags"
    for name in expected.fields.keys() | received.fields.keys():
        wanted, came = expected.fields.get(name), received.fields.get(name)
        if name == "id" and expected.type == PUBLISH:
            if not expected.first & 8:  # not a duplicate: a new id
                ids[wanted] = came
            wanted = ids.setdefault(wanted, came)
        elif name == "id" and expected.type == PUBREL:
            wanted = ids.get(wanted, wanted)
        elif name == "reason" and expected.type in (PUBACK, PUBREC):
            wanted, came = (0 if code == 0x10 else code for code in (wanted, came))
        elif name == "reason" and expected.type == DISCONNECT and wanted in WRONG:
            wanted, came = (0x81 if code in WRONG else code for code in (wanted, came))
        elif name == "properties":
            wanted, came = (_kept(expected.type, properties or []) for properties in (wanted, came))
        if wanted != came:
            return f"{name} is {came}, not {wanted}"
    return None


def _kept(kind, properties):
    """The properties that count, in an order that means nothing."""
    if kind != PUBLISH:
        properties = [one for one in properties if one[0] not in (REASON_STRING, USER_PROPERTY)]
    if kind == CONNACK:
        properties = [one for one in properties if one[0] not in ANNOUNCED]
    return sorted(properties, key=lambda one: one[0])  # stable: user properties keep their order


class Line:
    """A client's end of a connection, on a socket of any kind."""

    def __init__(self, recv):
        self._recv = recv
        self._data = b""
        self._packets = []
        self._held = []
        self.version = 4
        self.client_id = b""

    def note(self, data):
        """Learns version and client id from a CONNECT that is sent."""
        try:
            packets, _ = split(data)
            for first, body, _ in packets:
                if first >> 4 == CONNECT:
                    reader = Reader(body)
                    reader.data()
                    self.version = reader.number(1) & 0x7F
                    reader.take(3)
                    if self.version == 5:
                        reader.properties()
                    self.client_id = reader.data()
        except Malformed:
            pass  # sent on purpose

    def packet(self, wanted=None):
        """The next packet; raises `Closed`, `Malformed` or `TimeoutError`.

        If an answer is `wanted`, messages wait, and the other way round.
        """
        others = {PUBLISH} if wanted in ANSWERS else ANSWERS if wanted == PUBLISH else set()
        for packet in self._held:
            if packet.type not in others:
                self._held.remove(packet)
                return packet
        while (packet := self._next()).type in others:
            self._held.append(packet)
        return packet

    def _next(self):
        while not self._packets:
            try:
                data = self._recv(65536)
            except ConnectionError as error:
                raise Closed from error
            if not data:
                raise Closed
            self._packets, self._data = split(self._data + data)
        return decode(*self._packets.pop(0), self.version)

    def bytes(self, count):
        """At most so many bytes, as they came."""
        waiting = [packet.raw for packet in self._held] + [raw for _, _, raw in self._packets]
        data = b"".join(waiting) + self._data or self._recv(count)
        self._held = []
        self._packets, self._data = split(data[count:])
        return data[:count]

    def expect(self, expected, ids):
        """Takes what is expected; says what is wrong, or nothing. No bytes mean the end of the connection."""
        if not expected:
            return self._expect_end()
        packets, rest = split(expected)
        assert not rest, f"the case expects half a packet: {expected.hex(' ')}"
        for one in packets:
            wanted = decode(*one, self.version)
            try:
                came = self.packet(wanted.type)
            except Closed:
                return f"closed, expected {wanted}"
            except TimeoutError:
                return f"silence, expected {wanted}"
            except Malformed as error:
                return f"malformed: {error}"
            if self.version == 3 and came.type == CONNACK:
                came.fields["session"] = 0  # MQTT 3.1 knows no session present flag
            wrong = difference(wanted, came, ids)
            if wrong:
                return f"{wrong}\n  received {came}\n  expected {wanted}"
        return None

    def _expect_end(self):
        """The end: in MQTT 5 a DISCONNECT may come first (4.13.2), or a CONNACK that refuses (3.1.4)."""
        last = None
        try:
            while True:
                came = self.packet()
                is_refusal = came.type in (CONNACK, DISCONNECT) and came.fields["reason"] >= 0x80
                if last or not is_refusal or self.version != 5:
                    return f"still connected, received {came}"
                last = came
        except Closed:
            return None
        except TimeoutError:
            return "still connected"
        except Malformed as error:
            return f"malformed: {error}"


def translate(data, ids):
    """What a client sends, with the packet ids that the broker chose instead of the expected ones."""
    if len(data) >= 4 and data[0] >> 4 in (PUBACK, PUBREC, PUBCOMP) and data[1] == len(data) - 2:
        (expected,) = struct.unpack("!H", data[2:4])
        return data[:2] + struct.pack("!H", ids.get(expected, expected)) + data[4:]
    return data
