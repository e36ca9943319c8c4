"""Shows that the stand-in has each documented quirk: a table of inputs and what becomes of the device.

    micropython quirks.py

The broker here is a table of retained messages, as any broker is for such a device.
"""

import binascii
import hashlib
import json
import os
import sys
from collections import OrderedDict

sys.path.insert(0, __file__.rsplit("/", 1)[0] if "/" in __file__ else ".")

from node import CHANNELS, PACKAGES, Node, Wheel, length, take_packet, text

CHANNEL = CHANNELS + "dev"
ID = "esp32-0a1b2c"
CMD = "mpypi/nodes/%s/cmd" % ID
TAG = "py3-none-any"
# As often as a device is started anew before it counts as looping.
BOOTS = 4


# ---- wheels to try


def zipped(members, comment=b"", before=b"", behind=b"", extra=b"", method=0, bad_crc=None, directories=()):
    """An archive; `extra` stands in local headers only."""
    out, directory = before, b""
    for name in directories:
        members = dict(members)
        members[name] = b""
    for name, content in members.items():
        packed = content
        if method == 8:
            # One stored block: MicroPython here only inflates.
            packed = b"\x01" + le(len(content), 2) + le(len(content) ^ 0xFFFF, 2) + content
        crc = binascii.crc32(content) ^ (1 if name == bad_crc else 0)
        fields = le(20, 2) + le(0, 2) + le(method, 2) + le(0, 4)
        fields += le(crc, 4) + le(len(packed), 4) + le(len(content), 4)
        name = name.encode()
        at = len(out) - (len(before) if before else 0)
        out += b"PK\x03\x04" + fields + le(len(name), 2) + le(len(extra), 2) + name + extra + packed
        directory += b"PK\x01\x02" + le(20, 2) + fields + le(len(name), 2) + bytes(12) + le(at, 4) + name
    end = le(0, 2) * 2 + le(len(members), 2) * 2 + le(len(directory), 4) + le(len(out) - len(before), 4)
    return out + directory + b"PK\x05\x06" + end + le(len(comment), 2) + comment + behind


def le(value, size):
    return value.to_bytes(size, "little")


def line(name, content):
    digest = binascii.b2a_base64(hashlib.sha256(content).digest()).decode().strip()
    return "%s,sha256=%s,%d" % (name, digest.replace("+", "-").replace("/", "_").rstrip("="), len(content))


def wheel(name="demo", version="1.0", files=None, **how):
    """A wheel that installs, but for what `how` says."""
    folder = how.get("folder", "%s-%s.dist-info" % (name.replace("-", "_"), version))
    metadata = "Metadata-Version: 2.1\nName: %s\nVersion: %s\n" % (name, version) + how.get("metadata", "")
    members = {"%s/__init__.py" % name: b"V = '%s'\n" % version.encode()} if files is None else dict(files)
    members[folder + "/METADATA"] = metadata.encode()
    members[folder + "/WHEEL"] = ("Wheel-Version: 1.0\nTag: other\nTag: %s\n" % how.get("tag", TAG)).encode()
    if how.get("licenses"):
        members[folder + "/licenses/LICENSE"] = b"free\n"
    record = [line(file, content) for file, content in members.items() if file != how.get("unrecorded")]
    if how.get("bad_record"):
        record[0] = line(how["bad_record"], b"something else")
    record.append(folder + "/RECORD,,")
    members[folder + "/RECORD"] = ("\n".join(record) + "\n" + how.get("record", "")).encode()
    return zipped(members, **how.get("zip", {}))


def digest(content):
    return binascii.hexlify(hashlib.sha256(content).digest()).decode()


def wheel_entry(content, name="demo", version="1.0"):
    return {"type": "wheel", "name": name, "version": version, "pkg_sha256": digest(content)}


def src_entry(path, content, sha=None):
    return {"type": "src", "path": path, "pkg_sha256": sha or digest(content)}


# ---- a broker and a device


class Broker:
    def __init__(self, retained):
        self.retained = {topic: content for topic, content in retained.items() if content}
        self.info = None
        self.info_was_retained = None
        self.codes = {}
        self.subscribed = []
        self.log = []

    def serve(self, node):
        """Exchanges packets until nothing is under way any more; says whether the client is still there."""
        while node.out:
            packets, node.out = node.out, []
            for raw in packets:
                first, body, rest = take_packet(raw)
                assert rest == b""
                self.log.append(raw)
                kind = first >> 4
                v5 = 1 if node.mqtt == 5 else 0
                if kind == 1:
                    node.receive(bytes([0x20, 2 + v5, 0, self.codes.get("CONNACK", 0)]) + b"\x00" * v5)
                elif kind == 3:
                    size = int.from_bytes(body[:2], "big")
                    self.info_was_retained = bool(first & 1)
                    self.info = json.loads(body[2 + size + v5 :])
                elif kind == 8:
                    size = int.from_bytes(body[2 + v5 : 4 + v5], "big")
                    topic = body[4 + v5 : 4 + v5 + size].decode()
                    if "+" in topic or "#" in topic:
                        return False  # no client may send such a filter
                    self.subscribed.append(topic)
                    code = self.codes.get(topic, 0)
                    node.receive(bytes([0x90, 3 + v5]) + body[:2] + b"\x00" * v5 + bytes([code]))
                    if topic in self.retained and code < 0x80:
                        node.receive(publish(topic, self.retained[topic], True, v5))
        return True

    def send(self, node, topic, content, **how):
        node.receive(publish(topic, content, False, 1, **how))
        return self.serve(node)


def publish(topic, content, retain, v5, properties=b""):
    body = text(topic) + (length(len(properties)) + properties if v5 else b"") + content
    return bytes([0x30 | (1 if retain else 0)]) + length(len(body)) + body


class Device:
    """Files, and what happens to them."""

    def __init__(self, root, **options):
        self.root = root
        self.options = options
        self.events = []
        options["say"] = self.events.append

    def has(self, path):
        try:
            with open(self.root + "/" + path, "rb") as file:
                return file.read()
        except OSError:
            return None

    def put(self, path, content):
        at = path.find("/")
        while at >= 0:
            try:
                os.mkdir(self.root + "/" + path[:at])
            except OSError:
                pass
            at = path.find("/", at + 1)
        with open(self.root + "/" + path, "wb") as file:
            file.write(content)

    def boot(self, broker):
        self.node = Node(self.root, ID, "dev", **self.options)
        self.there = broker.serve(self.node)
        return self.node

    def settle(self, broker):
        """Boots until it rests: `running`, `hang`, `deaf`, or `loop`."""
        for _ in range(BOOTS):
            node = self.boot(broker)
            if node.state != "reset":
                if node.deaf or not self.there:
                    return "deaf"
                return {"booting": "hang", "running": "running"}[node.state]
        return "loop"

    def install(self, content):
        """Has a wheel unpacked, past any broker."""
        node = Node(self.root, ID, "dev")
        node.library.install(Wheel(content))


def remove_all(path):
    for name in os.listdir(path):
        name = path + "/" + name
        if os.stat(name)[0] & 0x4000:
            remove_all(name)
        else:
            os.remove(name)
    os.rmdir(path)


BASE = "/tmp/mpyblox-quirks-%s" % binascii.hexlify(os.urandom(6)).decode()
count = [0]


def fresh(**options):
    count[0] += 1
    root = "%s/%d" % (BASE, count[0])
    os.mkdir(root)
    device = Device(root, **options)
    device.put("lib/.keep", b"x")
    device.put("main.py", b"# first\n")
    device.install(wheel("mpy-blox", "0.6.0", {"mpy_blox/__init__.py": b"# core\n"}))
    return device


def retained(*entries, packages=()):
    found = {CHANNEL: json.dumps(list(entries)).encode()}
    for kind, content in packages:
        found["%s%s/%s" % (PACKAGES, kind, digest(content))] = content
    return found


def has(kind, content):
    return (kind, content)


# ---- the table: what is retained, what the device has before, what becomes of it


NEW = b"# second\n"
DEMO1, DEMO2 = wheel(), wheel(version="2.0")


def upgraded(content, version="2.0", **more):
    """A channel that has a device with demo 1.0 take this wheel."""
    entry = wheel_entry(content, version=version)
    return retained(entry, packages=[has("wheel", content)])


def channel(payload):
    return {CHANNEL: payload}


def src(path, content=NEW, sha=None):
    entry = src_entry(path, content, sha)
    found = {CHANNEL: json.dumps([entry]).encode()}
    found["%ssrc/%s/%s" % (PACKAGES, path, entry["pkg_sha256"])] = content
    return found


def merged(*tables):
    entries, found = [], {}
    for table in tables:
        found.update(table)
        entries += json.loads(table[CHANNEL])
    found[CHANNEL] = json.dumps(entries).encode()
    return found


BODY = wheel(version="2.0", metadata="\nA description\n")
BLANK = wheel(version="2.0", metadata="\n")
RAW = {
    "an empty list": (channel(b"[]"), "running"),
    "a list with unknown types": (channel(b'[{"type":"release","sequence":1},{"type":"x"}]'), "running"),
    "no channel message": ({}, "hang"),
    "an object": (channel(b"{}"), "hang"),
    "null": (channel(b"null"), "hang"),
    "a number": (channel(b"3"), "hang"),
    "a string": (channel(b'"x"'), "hang"),
    "bad JSON": (channel(b"[{"), "hang"),
    "an entry without type": (channel(b'[{"path":"x"}]'), "hang"),
    "an entry without a digest": (channel(b'[{"type":"src","path":"x"}]'), "hang"),
    "a src file": (src("main.py"), "running"),
    "a src file that is there already": (src("main.py", b"# first\n"), "running"),
    "an empty src file": (src("main.py", b""), "hang"),
    "src into a folder that is not there": (src("data/x.py"), "hang"),
    "src without a path": (src(""), "hang"),
    "src at a folder": (src("lib"), "hang"),
    "src with a path that ends in a slash": (src("main.py/"), "hang"),
    "src with a plus": (src("a+b.py"), "deaf"),
    "src with a number sign": (src("a#b.py"), "deaf"),
    "src whose bytes have another digest": (src("main.py", NEW, digest(b"else")), "loop"),
    "src with an upper-case digest": (src("main.py", NEW, digest(NEW).upper()), "loop"),
    "two digests for one path": (merged(src("main.py"), src("main.py", b"# third\n")), "loop"),
    "src that the broker does not have": (channel(json.dumps([src_entry("x.py", NEW)]).encode()), "hang"),
    "a wheel that is not installed": (upgraded(DEMO1, "1.0"), "hang"),
}
WITH_DEMO = {
    "the installed wheel": (upgraded(DEMO1, "1.0"), "running"),
    "the next wheel": (upgraded(DEMO2), "running"),
    "an earlier wheel": (upgraded(wheel(version="0.9"), "0.9"), "running"),
    "the next wheel, deflated": (upgraded(wheel(version="2.0", zip={"method": 8})), "running"),
    "a directory entry": (upgraded(wheel(version="2.0", zip={"directories": ["demo/"]})), "running"),
    "what is installed, another digest": (upgraded(wheel(files={"demo/x.py": b"x"}), "1.0"), "running"),
    "a version that METADATA does not say": (upgraded(DEMO2, "2.0.0"), "loop"),
    "a number as version": (upgraded(DEMO1, 1.0), "loop"),
    "two versions": (merged(upgraded(DEMO1, "1.0"), upgraded(DEMO2)), "loop"),
    "a wheel that the broker does not have": (retained(wheel_entry(DEMO2, version="2.0")), "hang"),
    "METADATA with a description": (upgraded(BODY), "hang"),
    "METADATA with a blank line at its end": (upgraded(BLANK), "hang"),
    "another tag": (upgraded(wheel(version="2.0", tag="mpy6-bytecode-esp32")), "hang"),
    "a bad CRC": (upgraded(wheel(version="2.0", zip={"bad_crc": "demo/__init__.py"})), "hang"),
    "a bad RECORD digest": (upgraded(wheel(version="2.0", bad_record="demo/__init__.py")), "hang"),
    "a blank line in RECORD": (upgraded(wheel(version="2.0", record="\n")), "hang"),
    "a quoted name in RECORD": (upgraded(wheel(version="2.0", record='"a,b.py",,\n')), "hang"),
    "an archive comment": (upgraded(wheel(version="2.0", zip={"comment": b"hello"})), "hang"),
    "bytes before the archive": (upgraded(wheel(version="2.0", zip={"before": b"#!python\n"})), "hang"),
    "bytes behind the archive": (upgraded(wheel(version="2.0", zip={"behind": b"\n"})), "hang"),
    "an aligned entry": (upgraded(wheel(version="2.0", zip={"extra": b"\xfe\xca\x01\x00\x00"})), "hang"),
    "zip's other compressions": (upgraded(wheel(version="2.0", zip={"method": 12})), "hang"),
    "a wheel and src, both there": (merged(src("main.py"), upgraded(DEMO1, "1.0")), "running"),
}


def table():
    for name, (broker, expected) in RAW.items():
        check(name, fresh().settle(Broker(broker)), expected)
    for name, (broker, expected) in WITH_DEMO.items():
        device = fresh()
        device.install(DEMO1)
        check(name, device.settle(Broker(broker)), expected)


def check(name, found, expected):
    print("ok" if found == expected else "FAILED", "-", name, "" if found == expected else (found, expected))
    if found != expected:
        failed.append(name)


failed = []


# ---- one at a time


def a_wheel_that_is_not_there_takes_the_whole_list_with_it():
    device = fresh()
    broker = Broker(merged(src("main.py"), upgraded(DEMO1, "1.0")))
    assert device.settle(broker) == "hang"
    assert device.has("main.py") == b"# first\n"
    # What is right later frees it.
    broker.send(device.node, CHANNEL, b"[]")
    assert device.node.state == "running"


def a_hang_is_freed_by_cmd_too():
    device = fresh()
    broker = Broker({"%ssrc/main.py/%s" % (PACKAGES, digest(NEW)): NEW})
    assert device.settle(broker) == "hang"
    broker.send(device.node, CMD, json.dumps([src_entry("main.py", NEW)]).encode())
    assert device.node.state == "reset" and device.has("main.py") == NEW


def the_packets_are_the_documented_ones():
    device = fresh()
    broker = Broker(src("main.py"))
    device.boot(broker)
    connect = b"\x10" + length(13 + len(ID)) + b"\x00\x04MQTT\x05\x02\x00\x00\x00" + text(ID)
    assert broker.log[0] == connect, broker.log[0]
    assert broker.log[1][0] == 0x30 and broker.info_was_retained is False
    assert broker.info["versions"] == {"mpy-blox": "0.6.0"}
    assert set(broker.info["uname"]) == {"sysname", "machine", "version"}
    assert broker.subscribed == [CMD, CHANNEL, "%ssrc/main.py/%s" % (PACKAGES, digest(NEW))]
    assert [packet[0] for packet in broker.log[2:]] == [0x82] * 3
    assert all(packet[-1] == 0 for packet in broker.log[2:])


def with_a_watchdog_it_has_a_keep_alive():
    device = fresh(keep_alive="30")
    broker = Broker(channel(b"[]"))
    device.boot(broker)
    assert broker.log[0][10:12] == b"\x00\x1e"


def refusals_make_it_start_again():
    for codes in ({"CONNACK": 0x87}, {CMD: 0x80}, {CHANNEL: 0x87}):
        device = fresh()
        broker = Broker(channel(b"[]"))
        broker.codes = codes
        assert device.settle(broker) == "loop", codes


def without_auto_update_a_list_is_only_looked_at():
    device = fresh(auto="0")
    broker = Broker(merged(src("main.py"), upgraded(DEMO1, "1.0")))
    assert device.settle(broker) == "running" and device.has("main.py") == b"# first\n"
    broker = Broker({})
    assert device.settle(broker) == "running"
    broker.retained["%ssrc/main.py/%s" % (PACKAGES, digest(NEW))] = NEW
    broker.send(device.node, CMD, json.dumps([src_entry("main.py", NEW)]).encode())
    assert device.node.state == "reset" and device.has("main.py") == NEW


def a_new_list_replaces_what_waits():
    device = fresh()
    broker = Broker(channel(json.dumps([src_entry("gone.py", NEW)]).encode()))
    assert device.settle(broker) == "hang"
    broker.retained["%ssrc/main.py/%s" % (PACKAGES, digest(NEW))] = NEW
    broker.send(device.node, CHANNEL, json.dumps([src_entry("main.py", NEW)]).encode())
    assert device.node.state == "reset" and device.has("gone.py") is None


def a_package_published_later_is_still_taken():
    device = fresh()
    broker = Broker(channel(json.dumps([src_entry("main.py", NEW)]).encode()))
    assert device.settle(broker) == "hang"
    broker.send(device.node, "%ssrc/main.py/%s" % (PACKAGES, digest(NEW)), NEW)
    assert device.node.state == "reset" and device.has("main.py") == NEW


def an_upgrade_removes_what_is_gone_and_the_old_dist_info():
    device = fresh()
    device.install(wheel(files={"demo/a.py": b"a", "demo/b.py": b"b"}))
    new = wheel(version="2.0", files={"demo/a.py": b"a", "demo/c.py": b"c"})
    assert device.settle(Broker(upgraded(new))) == "running"
    assert device.has("lib/demo/b.py") is None and device.has("lib/demo/c.py") == b"c"
    assert "demo-1.0.dist-info" not in os.listdir(device.root + "/lib")


def a_member_that_record_does_not_name_is_not_installed():
    device = fresh()
    device.install(wheel(files={"demo/a.py": b"a", "demo/b.py": b"b"}, unrecorded="demo/b.py"))
    assert device.has("lib/demo/a.py") == b"a" and device.has("lib/demo/b.py") is None


def record_may_lead_out_of_the_prefix():
    device = fresh()
    device.install(wheel(files={"../out.py": b"out"}))
    assert device.has("out.py") == b"out"


def licenses_wedge_the_next_upgrade():
    device = fresh()
    device.install(wheel(licenses=True))
    device.install(wheel("zeta", "1.0"))
    broker = Broker(upgraded(DEMO2))
    assert device.settle(broker) == "hang"
    # The new files are there, and what is left of the old dist-info hides all that comes after it.
    assert device.has("lib/demo/__init__.py") == b"V = '2.0'\n"
    assert os.listdir(device.root + "/lib/demo-1.0.dist-info") == ["licenses"]
    assert device.settle(broker) == "hang"
    assert broker.info["versions"] == {}
    # The three texts that make a package of what is left free it, for good.
    folder = "lib/demo-1.0.dist-info/"
    texts = {
        "METADATA": b"Metadata-Version: 2.1\nName: demo.replaced-1.0\nVersion: 1.0\n",
        "WHEEL": b"Wheel-Version: 1.0\nTag: py3-none-any\n",
        "RECORD": b"demo-1.0.dist-info/METADATA,,\n",
    }
    for name, content in texts.items():
        broker.retained["%ssrc/%s%s/%s" % (PACKAGES, folder, name, digest(content))] = content
    repair = [src_entry(folder + name, content) for name, content in texts.items()]
    broker.send(device.node, CMD, json.dumps(repair).encode())
    assert device.node.state == "reset"
    assert device.settle(broker) == "running"
    assert broker.info["versions"]["demo"] == "2.0" and broker.info["versions"]["zeta"] == "1.0"
    third = wheel(version="3.0")
    assert device.settle(Broker(upgraded(third, "3.0"))) == "running"


def renaming_what_has_licenses_keeps_the_next_upgrade_from_wedging():
    device = fresh()
    device.install(wheel(licenses=True))
    metadata = b"Metadata-Version: 2.1\nName: demo.replaced-1.0\nVersion: 1.0\n"
    broker = Broker(merged(src("lib/demo-1.0.dist-info/METADATA", metadata)))
    assert device.settle(broker) == "running"
    assert "demo" not in broker.info["versions"]
    broker = Broker(upgraded(DEMO2))
    broker.retained[CHANNEL] = b"[]"
    assert device.settle(broker) == "running"
    broker.send(device.node, CMD, json.dumps([wheel_entry(DEMO2, "mpy-blox", "0")]).encode())
    assert device.node.state == "reset"
    assert device.settle(Broker(upgraded(DEMO2))) == "running"


def a_first_install_goes_by_cmd_under_the_name_of_what_is_there():
    device = fresh()
    broker = Broker(upgraded(DEMO1, "1.0"))
    broker.retained[CHANNEL] = b"[]"
    assert device.settle(broker) == "running"
    broker.send(device.node, CMD, json.dumps([wheel_entry(DEMO1, "mpy-blox", "0")]).encode())
    assert device.node.state == "reset"
    assert device.settle(Broker(upgraded(DEMO1, "1.0"))) == "running"
    assert broker.info["versions"] == {"mpy-blox": "0.6.0"} and device.has("lib/demo/__init__.py")
    # On a retained channel, that entry loops.
    broker = Broker(retained(wheel_entry(DEMO2, "mpy-blox", "0"), packages=[has("wheel", DEMO2)]))
    assert device.settle(broker) == "loop"


def a_carrier_brings_another_package_along():
    device = fresh()
    inner = {"other/__init__.py": b"o"}
    texts = {
        "other-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: other\nVersion: 1.0\n",
        "other-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nTag: py3-none-any\n",
        "other-1.0.dist-info/RECORD": b"other/__init__.py,,\nother-1.0.dist-info/RECORD,,\n",
    }
    files = {"demo/__init__.py": b"2"}
    files.update(inner)
    files.update(texts)
    device.install(DEMO1)
    carrier = carried("demo", "2.0", files)
    assert device.settle(Broker(upgraded(carrier))) == "running"
    broker = Broker(channel(b"[]"))
    device.settle(broker)
    assert broker.info["versions"]["other"] == "1.0" and broker.info["versions"]["demo"] == "2.0"


def carried(name, version, files):
    """A carrier: its own dist-info comes first in the archive."""
    folder = "%s-%s.dist-info" % (name, version)
    first = {
        folder + "/METADATA": ("Metadata-Version: 2.1\nName: %s\nVersion: %s\n" % (name, version)).encode(),
        folder + "/WHEEL": ("Wheel-Version: 1.0\nTag: %s\n" % TAG).encode(),
    }
    record = [line(file, content) for part in (first, files) for file, content in part.items()]
    first[folder + "/RECORD"] = ("\n".join(record + [folder + "/RECORD,,"]) + "\n").encode()
    members = OrderedDict()
    for part in (first, files):
        for file, content in part.items():
            members[file] = content
    return zipped(members)


def what_is_larger_than_its_memory_makes_it_deaf():
    device = fresh(heap=str(512 * 1024))
    assert device.settle(Broker(src("main.py", b"x" * (104 * 1024)))) == "running"
    assert device.settle(Broker(src("main.py", b"x" * (104 * 1024 + 1)))) == "deaf"


def an_alias_loses_a_message_and_a_disconnect_is_ignored():
    device = fresh()
    broker = Broker(channel(b"[]"))
    assert device.settle(broker) == "running"
    broker.send(device.node, "", b"[]", properties=b"\x23\x00\x01")
    device.node.receive(b"\xe0\x02\x8b\x00")
    assert device.node.state == "running" and not device.node.deaf


def properties_are_skipped_and_a_hundred_entries_applied():
    device = fresh()
    entries, packages = [], {}
    for n in range(100):
        content = b"# %d\n" % n
        entries.append(src_entry("f%d.py" % n, content))
        packages["%ssrc/f%d.py/%s" % (PACKAGES, n, digest(content))] = content
    broker = Broker(packages)
    broker.retained[CHANNEL] = b"[]"
    device.settle(broker)
    broker.send(device.node, CHANNEL, json.dumps(entries).encode(), properties=b"\x02\x00\x01\x51\x80")
    assert device.node.state == "reset" and device.has("f99.py") == b"# 99\n"


def earlier_generations_address_packages_otherwise():
    for layout, wheel_topic, src_topic in (
        ("flat", digest(DEMO2), "main.py"),
        ("path", "wheel/" + digest(DEMO2), "src/main.py"),
    ):
        device = fresh(layout=layout, mqtt="4", info="0")
        device.install(DEMO1)
        found = {CHANNEL: json.dumps([wheel_entry(DEMO2, version="2.0"), src_entry("main.py", NEW)]).encode()}
        found[PACKAGES + wheel_topic] = DEMO2
        found[PACKAGES + src_topic] = NEW
        broker = Broker(found)
        assert device.settle(broker) == "running", layout
        assert device.has("main.py") == NEW
        assert broker.log[0][8] == 4 and broker.info is None


def early_ones_leave_the_reserved_bits_of_a_subscribe_0():
    device = fresh(subscribe_flags="0")
    broker = Broker(channel(b"[]"))
    assert device.settle(broker) == "running"
    assert [packet[0] for packet in broker.log] == [0x10, 0x30, 0x80, 0x80]


ONE_BY_ONE = [
    a_wheel_that_is_not_there_takes_the_whole_list_with_it,
    a_hang_is_freed_by_cmd_too,
    the_packets_are_the_documented_ones,
    with_a_watchdog_it_has_a_keep_alive,
    refusals_make_it_start_again,
    without_auto_update_a_list_is_only_looked_at,
    a_new_list_replaces_what_waits,
    a_package_published_later_is_still_taken,
    an_upgrade_removes_what_is_gone_and_the_old_dist_info,
    a_member_that_record_does_not_name_is_not_installed,
    record_may_lead_out_of_the_prefix,
    licenses_wedge_the_next_upgrade,
    renaming_what_has_licenses_keeps_the_next_upgrade_from_wedging,
    a_first_install_goes_by_cmd_under_the_name_of_what_is_there,
    a_carrier_brings_another_package_along,
    what_is_larger_than_its_memory_makes_it_deaf,
    an_alias_loses_a_message_and_a_disconnect_is_ignored,
    properties_are_skipped_and_a_hundred_entries_applied,
    earlier_generations_address_packages_otherwise,
    early_ones_leave_the_reserved_bits_of_a_subscribe_0,
]


os.mkdir(BASE)
try:
    table()
    for test in ONE_BY_ONE:
        try:
            test()
            check(test.__name__, True, True)
        except Exception as error:
            sys.print_exception(error)
            check(test.__name__, repr(error), True)
finally:
    remove_all(BASE)
print("%d quirks, %d failed" % (len(RAW) + len(WITH_DEMO) + len(ONE_BY_ONE), len(failed)))
sys.exit(1 if failed else 0)
