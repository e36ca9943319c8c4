"""A stand-in for Mpy-BLOX, for MicroPython's Unix port.

It does what Mpy-BLOX 0.6.0 is documented to do, down to its packets, what it refuses, where it waits for ever
and when it resets in a loop; none of its code is Mpy-BLOX's. `quirks.py` shows that it has each quirk. Bytes
in, bytes out: `Node` has no socket. Run as a program, it is a device on a broker:

    micropython node.py HOST PORT ROOT CLIENT_ID CHANNEL [option=value ...]

and says what happens, one JSON object a line. A reset starts it anew on the same files, as often as `boots`
allows. When nothing is on its way any more it says `rests`: it then knows from two pings, which the original
only sends with a watchdog, that the broker has answered everything. Whoever rests while it boots waits for ever.
"""

import binascii
import deflate
import hashlib
import io
import json
import os
import sys
from collections import OrderedDict

CHANNELS = "mpypi/channels/"
NODES = "mpypi/nodes/"
PACKAGES = "mpypi/packages/"

CONNECT, CONNACK, PUBLISH, SUBSCRIBE, SUBACK, PINGREQ, PINGRESP, DISCONNECT = 1, 2, 3, 8, 9, 12, 13, 14

# What the original takes with a heap of 512 kB, per byte of heap.
SRC_SHARE = 104 / 512
WHEEL_SHARE = 96 / 512


class Refused(Exception):
    """The broker said no: nobody catches that, so the device starts again."""


# ---- wheels


class Wheel:
    """A wheel as the original reads it: strictly, and all at once."""

    def __init__(self, data):
        self.data = data
        self.members = OrderedDict()
        end = len(data) - 22
        # Its own end only: no archive comment, nothing behind it.
        if data[end : end + 4] != b"PK\x05\x06":
            raise ValueError("no end of a zip archive")
        count = number(data, end + 10, 2)
        at = number(data, end + 16, 4)
        for _ in range(count):
            if data[at : at + 4] != b"PK\x01\x02":
                raise ValueError("no zip directory where it should be")
            name_size, extra_size, comment_size = (number(data, at + n, 2) for n in (28, 30, 32))
            name = data[at + 46 : at + 46 + name_size].decode()
            # The local header is taken to be as long as this one.
            start = number(data, at + 42, 4) + 30 + name_size + extra_size
            fields = ((10, 2), (16, 4), (20, 4), (24, 4))
            method, crc, packed, size = (number(data, at + field, width) for field, width in fields)
            self.members[name] = (method, crc, start, packed, size)
            at += 46 + name_size + extra_size + comment_size
        # The first dist-info in the archive is the wheel's.
        records = [name for name in self.members if name.endswith(".dist-info/RECORD")]
        if not records:
            raise ValueError("no dist-info")
        self.folder = records[0][: -len("/RECORD")]
        self.name, self.version = self.folder[: -len(".dist-info")].split("-", 1)
        texts = [self.read(self.folder + "/" + text).decode() for text in ("METADATA", "WHEEL", "RECORD")]
        self.package = Package(*texts)

    def read(self, name):
        method, crc, start, packed, size = self.members[name]
        raw = self.data[start : start + packed]
        if method == 8:
            raw = deflate.DeflateIO(io.BytesIO(raw), deflate.RAW, 15).read()
        elif method != 0:
            raise ValueError("a compression that it does not know")
        if len(raw) != size or binascii.crc32(raw) != crc:
            raise ValueError("a bad CRC")
        return raw

    def file(self, name):
        content = self.read(name)
        digest, size = self.package.record[name]
        if size is not None and size != len(content):
            raise ValueError("a size that is not RECORD's")
        if digest is not None and digest != hashlib.sha256(content).digest():
            raise ValueError("a digest that is not RECORD's")
        return content


class Package:
    """What a dist-info folder says."""

    def __init__(self, metadata, wheel, record):
        metadata = headers(metadata)
        self.name = metadata["Name"]
        self.version = metadata["Version"]
        self.tag = headers(wheel)["Tag"]  # the last one, if there are several
        self.record = OrderedDict()
        for line in record.split("\n")[: -1 if record.endswith("\n") else None]:
            name, digest, size = line.rsplit(",", 2)
            if digest:
                algorithm, digest = digest.split("=", 1)
                if algorithm != "sha256":
                    raise ValueError("another digest than sha256")
                digest = binascii.a2b_base64(digest.replace("-", "+").replace("_", "/") + "=")
            self.record[name] = (digest or None, int(size) if size else None)


def headers(text):
    """`Key: value` lines, nothing else: a blank line or a description is an error."""
    found = {}
    for line in text.split("\n")[: -1 if text.endswith("\n") else None]:
        key, value = line.split(":", 1)
        found[key] = value.strip()
    return found


def number(data, at, size):
    part = data[at : at + size]
    if len(part) != size:
        raise ValueError("a zip archive that ends too early")
    return int.from_bytes(part, "little")


# ---- files


def read(path):
    with open(path, "rb") as file:
        return file.read()


def write(path, content):
    with open(path, "wb") as file:
        file.write(content)


def make_folders(path):
    at = path.find("/", 1)
    while at >= 0:
        try:
            os.mkdir(path[:at])
        except OSError:
            pass  # it is there
        at = path.find("/", at + 1)


class Library:
    """The wheels installed below `/lib`."""

    def __init__(self, root):
        self.prefix = root + "/lib/"

    def packages(self):
        """All packages, up to the first dist-info folder that cannot be read: that ends the list."""
        found = []
        try:
            for folder in sorted(os.listdir(self.prefix)):
                if folder.endswith(".dist-info") and "-" in folder:
                    names = ("METADATA", "WHEEL", "RECORD")
                    texts = [read(self.prefix + folder + "/" + name).decode() for name in names]
                    found.append(Package(*texts))
        except OSError:
            pass
        return found

    def package(self, name):
        for package in self.packages():
            if package.name == name:
                return package
        return None

    def install(self, wheel):
        old = self.package(wheel.package.name)
        if old is None:
            for name in wheel.package.record:
                make_folders(self.prefix + name)
                write(self.prefix + name, wheel.file(name))
            return
        if old.tag != wheel.package.tag:
            raise ValueError("another tag than %s" % old.tag)
        for name, said in wheel.package.record.items():
            before = old.record.get(name)
            if before is not None and before[0] is not None and before[0] == said[0]:
                continue  # unchanged
            if before is None:
                make_folders(self.prefix + name)
            write(self.prefix + name, wheel.file(name))
        for name in old.record:
            if name not in wheel.package.record:
                os.remove(self.prefix + name)
        if old.version != wheel.package.version:
            # Only the files in it are gone: a folder in it keeps it from going.
            os.rmdir("%s%s-%s.dist-info" % (self.prefix, wheel.name, old.version))


# ---- the device


class Node:
    """One boot. `state` is `booting`, `running` or `reset`; `waits` says what a booting one waits for."""

    def __init__(self, root, client_id, channel, **options):
        self.root = root
        self.client_id = client_id
        self.channel_topic = CHANNELS + channel
        self.cmd_topic = NODES + client_id + "/cmd"
        self.options = options
        self.mqtt = int(options.get("mqtt", 5))
        self.auto = options.get("auto", "1") == "1"
        self.say = options.get("say", lambda event: None)
        self.library = Library(root)
        self.state = "booting"
        self.waits = "CONNACK"
        self.deaf = False
        self.waiting = []  # package ids, in order
        self.done = False
        self.installed = False
        self.connack = None
        self.subacks = {}
        self.last_id = 0
        self.buffer = b""
        self.out = []
        self.tasks = []
        self.main = self.boot()
        self.tasks.append((self.main, None))
        self.run()

    # what it does

    def boot(self):
        # As the user's program may: it changes a file that came by an update.
        if "spoils" in self.options:
            write(self.root + "/" + self.options["spoils"], b"# changed by the program\n")
        self.connect()
        while self.connack is None:
            yield
        if self.connack >= 0x80 or (self.mqtt == 4 and self.connack):
            raise Refused("CONNACK %d" % self.connack)
        if self.options.get("info", "1") == "1":
            uname = os.uname() if hasattr(os, "uname") else ("esp32", "", "", "1.22.0", "ESP32")
            versions = {package.name: package.version for package in self.library.packages()}
            said = {"sysname": "esp32", "machine": uname[4], "version": uname[3]}
            self.say({"event": "info", "versions": versions})
            self.publish(NODES + self.client_id + "/info", json.dumps({"uname": said, "versions": versions}))
        self.waits = "SUBACK of cmd"
        yield from self.subscribe(self.cmd_topic)
        self.waits = "SUBACK of the channel"
        yield from self.subscribe(self.channel_topic)
        if self.auto:
            self.waits = "the channel"
            while not self.done:
                yield
            if self.installed:
                self.state = "reset"
                return
        self.state = "running"

    def take_list(self, payload, commanded):
        entries = json.loads(payload)
        if not isinstance(entries, list):
            raise ValueError("no array")
        del self.waiting[:]
        for entry in entries:
            if entry["type"] == "wheel":
                present = self.library.package(entry["name"])
                # There is no version of nothing: the whole list is given up.
                if present.version != entry["version"]:
                    self.want("wheel", "", entry["pkg_sha256"])
            elif entry["type"] == "src":
                digest = entry["pkg_sha256"]
                try:
                    content = read(self.root + "/" + entry["path"])
                    if binascii.hexlify(hashlib.sha256(content).digest()).decode() == digest:
                        continue
                except OSError:
                    pass
                self.want("src", entry["path"], digest)
        if not self.waiting:
            self.done = True
        elif commanded or self.auto:
            self.done = False
            for package in list(self.waiting):
                yield from self.subscribe(PACKAGES + package)
            while not self.done:
                yield
            if self.installed:
                self.state = "reset"

    def want(self, kind, path, digest):
        """Notes a package, addressed as its generation does."""
        layout = self.options.get("layout", "digest")
        if kind == "wheel":
            package = digest if layout == "flat" else "wheel/" + digest
        else:
            package = {"flat": path, "path": "src/" + path, "digest": "src/%s/%s" % (path, digest)}[layout]
        if package not in self.waiting:
            self.waiting.append(package)

    def take_package(self, package, payload):
        if package not in self.waiting:
            return
        self.waiting.remove(package)
        layout = self.options.get("layout", "digest")
        is_wheel = package.startswith("wheel/") if layout != "flat" else len(package) == 64
        if is_wheel:
            self.library.install(Wheel(payload))
        else:
            path = package if layout == "flat" else package[len("src/") :]
            path = path.rsplit("/", 1)[0] if layout == "digest" else path
            write(self.root + "/" + path, payload)
        self.installed = True
        if not self.waiting:
            self.done = True

    # packets

    def connect(self):
        keep_alive = int(self.options.get("keep_alive", 0))
        body = text("MQTT") + bytes([self.mqtt, 0x02]) + keep_alive.to_bytes(2, "big")
        self.send(CONNECT << 4, body + self.properties() + text(self.client_id))

    def properties(self):
        return b"\x00" if self.mqtt == 5 else b""

    def publish(self, topic, payload):
        self.send(PUBLISH << 4, text(topic) + self.properties() + payload.encode())

    def subscribe(self, topic):
        self.last_id += 1
        packet_id = self.last_id
        flags = int(self.options.get("subscribe_flags", 2))
        body = packet_id.to_bytes(2, "big") + self.properties() + text(topic) + b"\x00"
        self.say({"event": "subscribe", "topic": topic})
        self.send(SUBSCRIBE << 4 | flags, body)
        while packet_id not in self.subacks:
            yield
        code = self.subacks.pop(packet_id)
        if code >= 0x80:
            raise Refused("SUBACK %#x for %s" % (code, topic))

    def send(self, first, body):
        self.out.append(bytes([first]) + length(len(body)) + body)

    def receive(self, data):
        """Takes bytes of the broker; what it says to them is in `out`."""
        self.buffer += data
        while self.state != "reset" and not self.deaf:
            packet = take_packet(self.buffer)
            if packet is None:
                return
            first, body, self.buffer = packet
            self.packet(first, body)
            self.run()

    def packet(self, first, body):
        kind = first >> 4
        if kind == CONNACK:
            self.connack = body[1]
        elif kind == SUBACK:
            self.subacks[int.from_bytes(body[:2], "big")] = body[-1]
        elif kind == PUBLISH:
            size = int.from_bytes(body[:2], "big")
            topic, body = body[2 : 2 + size].decode(), body[2 + size :]
            if first & 0x06:
                body = body[2:]
            if self.mqtt == 5:
                skip, used = variable(body)
                body = body[used + skip :]
            heap = int(self.options.get("heap", 0))
            share = WHEEL_SHARE if "/wheel/" in topic else SRC_SHARE
            if heap and len(body) > heap * share:
                self.deaf = True  # nobody reads any more
                return
            self.message(topic, body)
        # Anything else means nothing to it, a DISCONNECT included.

    def message(self, topic, payload):
        self.say({"event": "message", "topic": topic, "size": len(payload)})
        if topic in (self.channel_topic, self.cmd_topic):
            self.say({"event": "list", "topic": topic, "list": payload.decode()})
            self.tasks.append((self.take_list(payload, topic == self.cmd_topic), "a list"))
        elif topic.startswith(PACKAGES):
            try:
                self.take_package(topic[len(PACKAGES) :], payload)
            except Exception as error:
                self.wrong(topic, error)
        # A topic that it never asked for, as the empty one of an alias: lost.

    def run(self):
        """Lets everyone go on who may; twice, since one may have waited for another."""
        for task in list(self.tasks) + list(self.tasks):
            if task not in self.tasks:
                continue
            if self.state == "reset":
                return
            generator, name = task
            try:
                next(generator)
            except StopIteration:
                self.tasks.remove(task)
            except Exception as error:
                self.tasks.remove(task)
                self.wrong(name or "boot", error)
                if generator is self.main:
                    self.state = "reset"

    def wrong(self, what, error):
        self.say({"event": "error", "in": what, "error": repr(error)})

    def rests(self):
        """What it waits for, if it boots."""
        if self.state == "booting" and self.waiting:
            return "packages " + " ".join(self.waiting)
        return self.waits if self.state == "booting" else None


def text(value):
    value = value.encode()
    return len(value).to_bytes(2, "big") + value


def length(size):
    out = b""
    while True:
        size, digit = size >> 7, size & 0x7F
        out += bytes([digit | (0x80 if size else 0)])
        if not size:
            return out


def variable(data):
    value = 0
    for at in range(4):
        value |= (data[at] & 0x7F) << (7 * at)
        if not data[at] & 0x80:
            return value, at + 1
    raise ValueError("a length of more than four bytes")


def take_packet(buffer):
    if len(buffer) < 2 or (len(buffer) < 5 and all(byte & 0x80 for byte in buffer[1:])):
        return None
    size, used = variable(buffer[1:5])
    end = 1 + used + size
    if len(buffer) < end:
        return None
    return buffer[0], buffer[1 + used : end], buffer[end:]


# ---- as a program


class Device:
    """A node on a socket, through its resets."""

    def __init__(self, host, port, root, client_id, channel, options):
        self.address = (host, int(port))
        self.options = options
        self.arguments = (root, client_id, channel)
        self.boots = int(options.get("boots", 20))
        self.options["say"] = self.say

    def say(self, event):
        print(json.dumps(event))

    def live(self):
        for boot in range(1, self.boots + 1):
            self.say({"event": "boot", "number": boot})
            if self.boot() != "reset":
                return
            self.say({"event": "reset", "number": boot})
        self.say({"event": "spent", "boots": self.boots})

    def boot(self):
        import select
        import socket

        stream = socket.socket()
        stream.connect(socket.getaddrinfo(*self.address)[0][-1])
        poll = select.poll()
        poll.register(stream, select.POLLIN)
        node = Node(*self.arguments, **self.options)
        interval = int(self.options.get("keep_alive", 0)) * 1000 // 3 or -1
        # Pings sent and answered, and the answer after which nothing is on its way any more.
        sent, answered, fence = 0, 0, 2
        while True:
            try:
                for packet in node.out:
                    stream.write(packet)
                node.out = []
                if node.state == "reset":
                    stream.close()
                    return "reset"
                if node.connack is not None and sent == answered and answered < fence:
                    sent += 1
                    stream.write(bytes([PINGREQ << 4, 0]))
                if not poll.poll(interval):
                    sent += 1
                    fence = max(fence, sent)
                    stream.write(bytes([PINGREQ << 4, 0]))
                    continue
                data = stream.recv(65536)
            except OSError:
                # The broker is gone, whether that shows when something is read or when it is written.
                data = b""
            if not data:
                self.say({"event": "deaf", "state": node.state, "for": "a broker"})
                return "deaf"
            while data:
                packet = None if node.buffer else take_packet(data)
                if packet is not None and packet[0] >> 4 == PINGRESP:
                    answered += 1
                    if answered == fence:
                        self.say({"event": "rests", "state": node.state, "for": node.rests()})
                    piece, data = b"", packet[2]
                elif packet is not None:
                    piece, data = data[: len(data) - len(packet[2])], packet[2]
                else:
                    piece, data = data, b""
                if piece:
                    node.receive(piece)
                    fence = sent + 2
                if node.deaf:
                    self.say({"event": "deaf", "state": node.state, "for": "memory"})
                    return "deaf"


def main(arguments):
    options = dict(option.split("=", 1) for option in arguments[5:])
    Device(*arguments[:5], options).live()


if __name__ == "__main__":
    main(sys.argv[1:])
