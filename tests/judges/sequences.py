"""mosquitto's packet sequences, sent to our broker byte by byte.

The suite describes them in JSON (`test/broker/data`) and runs them as one case; here each is one, with its own
verdict. Answers are compared by `wire`.
"""

import collections
import json
import pathlib
import socket
import sys

import wire

PATIENCE = 5


class Client:
    """A client that says what it is told to."""

    def __init__(self, port):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.line = wire.Line(self.socket.recv)
        self.ids = {}

    def send(self, data):
        self.line.note(data)
        try:
            self.socket.sendall(wire.translate(data, self.ids))
        except ConnectionError:
            pass  # what was expected instead tells

    def expect(self, data, what):
        wrong = self.line.expect(data, self.ids)
        assert not wrong, f"{what}: {wrong}"


def cases(folder):
    """Name and description of every sequence, in order."""
    seen = collections.Counter()
    for path in sorted(pathlib.Path(folder).glob("*.json")):
        for group in json.loads(path.read_text()):
            if group.get("disable"):
                continue
            for test in group["tests"]:
                name = " ".join(f"{group['group']}: {test['name']}".split())
                seen[name] += 1
                yield name if seen[name] == 1 else f"{name} #{seen[name]}", test


def play(port, name, test, suite):
    """Plays one sequence; raises `AssertionError` if the broker does something else than expected."""
    client = Client(port)
    try:
        client.line.version = test.get("ver", 4)
        if test.get("connect", True):
            client.send(suite.gen_connect(name, keepalive=60, proto_ver=client.line.version))
            client.expect(suite.gen_connack(rc=0, proto_ver=client.line.version), "CONNACK")
        for step in test["msgs"]:
            payload = bytes.fromhex(step.get("payload", "").replace(" ", "")) if step["type"] != "publish" else b""
            if step["type"] == "send":
                client.send(payload)
            elif step["type"] == "recv":
                client.expect(payload, step.get("comment", "answer"))
            elif step["type"] == "publish":
                publish(port, step, suite)
            else:
                raise AssertionError(f"a step that nobody knows: {step}")
        if test.get("expect_disconnect", True):
            client.expect(b"", "end")
        else:
            client.send(suite.gen_pingreq())
            client.expect(suite.gen_pingresp(), "PINGRESP")
    finally:
        client.socket.close()


def publish(port, step, suite):
    """Publishes as another client."""
    client, qos = Client(port), step["qos"]
    client.send(suite.gen_connect("helper", keepalive=60))
    client.expect(suite.gen_connack(rc=0), "the helper's CONNACK")
    client.send(suite.gen_publish(mid=1, qos=qos, topic=step["topic"], payload=step["payload"]))
    if qos == 1:
        client.expect(suite.gen_puback(mid=1), "the helper's PUBACK")
    elif qos == 2:
        client.expect(suite.gen_pubrec(mid=1), "the helper's PUBREC")
        client.send(suite.gen_pubrel(mid=1))
        client.expect(suite.gen_pubcomp(mid=1), "the helper's PUBCOMP")
    client.socket.close()


def run(folder, port):
    """Plays all sequences of an unpacked suite; yields name and complaint, `None` if there is none."""
    sys.path.insert(0, str(folder))
    import mosq_test_original as suite

    for name, test in cases(pathlib.Path(folder) / "broker/data"):
        try:
            play(port, name, test, suite)
            yield name, None
        except AssertionError as error:
            yield name, str(error)


if __name__ == "__main__":
    for name, complaint in run(sys.argv[1], int(sys.argv[2])):
        print(name, complaint or "", sep="\n", end="\0")
