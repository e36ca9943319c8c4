"""Python's clients and mosquitto's, each through the same scenes: `clients.py CASE PORT`.

A client is a small class with the same methods, so that a scene is written once.
"""

import asyncio
import contextlib
import pathlib
import queue
import subprocess
import sys
import threading

PATIENCE = 20


class Paho:
    """paho-mqtt, which speaks all versions."""

    version = 4

    def __init__(self, port, name, clean=True, will=None):
        from paho.mqtt import client as paho
        from paho.mqtt.packettypes import PacketTypes
        from paho.mqtt.properties import Properties

        five = self.version == 5
        options = {} if five else {"clean_session": clean}
        self.client = paho.Client(paho.CallbackAPIVersion.VERSION2, name, protocol=self.version, **options)
        self.messages, self.connected, self.subscribed = queue.Queue(), queue.Queue(), queue.Queue()
        self.client.on_message = lambda client, data, message: self.messages.put(message)
        self.client.on_connect = lambda client, data, flags, reason, properties: self.connected.put((flags, reason))
        self.client.on_subscribe = lambda client, data, mid, reasons, properties: self.subscribed.put(reasons)
        if will:
            self.client.will_set(*will, qos=1)
        options = {}
        if five:
            options = {"clean_start": clean, "properties": Properties(PacketTypes.CONNECT)}
            options["properties"].SessionExpiryInterval = 0 if clean else 100
        self.client.connect("127.0.0.1", port, **options)
        self.client.loop_start()
        flags, reason = self.connected.get(timeout=PATIENCE)
        assert not reason.is_failure, reason
        self.is_resumed = flags.session_present

    def subscribe(self, topic, qos):
        self.client.subscribe(topic, qos)
        assert self.subscribed.get(timeout=PATIENCE)[0].value == qos

    def publish(self, topic, payload, qos, retain=False, properties=None):
        self.client.publish(topic, payload, qos, retain, properties).wait_for_publish(PATIENCE)

    def receive(self):
        message = self.messages.get(timeout=PATIENCE)
        self.properties = getattr(message, "properties", None)
        return message.topic, bytes(message.payload), message.qos, bool(message.retain)

    def leave(self):
        self.client.disconnect()
        self.client.loop_stop()

    def vanish(self):
        """The line is cut, without a word."""
        self.client.on_disconnect = None
        self.client.reconnect_delay_set(3600, 3600)
        sock = self.client.socket()
        self.client.loop_stop()
        sock.close()


class Paho5(Paho):
    """paho-mqtt with MQTT 5."""

    version = 5


class Loop:
    """A client that lives in an event loop: the loop runs beside the scene."""

    def __init__(self):
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def do(self, what):
        return asyncio.run_coroutine_threadsafe(asyncio.wait_for(what, PATIENCE), self.loop).result()


class Aiomqtt(Loop):
    """aiomqtt, on paho-mqtt's packets."""

    def __init__(self, port, name, clean=True, will=None):
        import aiomqtt

        super().__init__()
        will = will and aiomqtt.Will(*will, qos=1)

        async def make():
            client = aiomqtt.Client("127.0.0.1", port, identifier=name, clean_session=clean, will=will)
            await client.__aenter__()
            return client

        self.client = self.do(make())

    def subscribe(self, topic, qos):
        (granted,) = self.do(self.client.subscribe(topic, qos))
        assert granted.value == qos, granted

    def publish(self, topic, payload, qos, retain=False):
        self.do(self.client.publish(topic, payload, qos, retain))

    def receive(self):
        message = self.do(anext(aiter(self.client.messages)))
        return message.topic.value, message.payload, message.qos, message.retain

    def leave(self):
        self.do(self.client.__aexit__(None, None, None))

    def vanish(self):
        self.loop.call_soon_threadsafe(self.client._client.socket().close)


class Amqtt(Loop):
    """amqtt, which has its own packets."""

    def __init__(self, port, name, clean=True, will=None):
        from amqtt.client import MQTTClient

        super().__init__()
        config = {"auto_reconnect": False, "cleansession": clean, "keep_alive": 60}
        if will:
            config["will"] = {"topic": will[0], "message": will[1].decode(), "qos": 1, "retain": False}

        async def make():
            client = MQTTClient(name, config=config)
            await client.connect(f"mqtt://127.0.0.1:{port}/", cleansession=clean)
            return client

        self.client = self.do(make())

    def subscribe(self, topic, qos):
        assert self.do(self.client.subscribe([(topic, qos)])) == [qos]

    def publish(self, topic, payload, qos, retain=False):
        self.do(self.client.publish(topic, payload, qos, retain))

    def receive(self):
        packet = self.do(self.client.deliver_message()).publish_packet
        return packet.topic_name, bytes(packet.data), packet.qos, packet.retain_flag

    def leave(self):
        self.do(self.client.disconnect())

    def vanish(self):
        self.loop.call_soon_threadsafe(self.client._handler.writer._writer.transport.abort)


def messages_arrive_once_at_every_qos(make):
    """... and in order, at each QoS, with any of 256 bytes in them."""
    reader, writer = make("reader"), make("writer")
    reader.subscribe("judge/+", 2)
    for qos in (0, 1, 2):
        payloads = [bytes(range(256)), *(b"%d" % n for n in range(20))]
        for payload in payloads:
            writer.publish(f"judge/{qos}", payload, qos)
        for payload in payloads:
            expect(reader.receive(), (f"judge/{qos}", payload, qos, False))
    writer.publish("judge/end", b"", 1)
    expect(reader.receive(), ("judge/end", b"", 1, False))
    reader.leave(), writer.leave()


def large_messages_pass_whole(make):
    """A mebibyte is far more than any socket holds."""
    client, payload = make("large"), bytes(range(256)) * 4096
    client.subscribe("judge/large", 1)
    client.publish("judge/large", payload, 1)
    expect(client.receive(), ("judge/large", payload, 1, False))
    client.leave()


def retained_messages_wait_for_who_subscribes(make):
    """... until they are cleared."""
    writer, reader = make("writer"), make("reader")
    writer.publish("judge/kept", b"first", 0, True)
    writer.publish("judge/kept", b"second", 1, True)
    reader.subscribe("judge/#", 1)
    expect(reader.receive(), ("judge/kept", b"second", 1, True))
    writer.publish("judge/kept", b"", 1, True)
    expect(reader.receive(), ("judge/kept", b"", 1, False))
    late = make("late")
    late.subscribe("judge/#", 1)
    writer.publish("judge/now", b"live", 1)
    expect(late.receive(), ("judge/now", b"live", 1, False))
    reader.leave(), writer.leave(), late.leave()


def a_will_is_published_for_who_is_lost_and_for_nobody_else(make):
    reader = make("reader")
    reader.subscribe("judge/will/+", 1)
    make("polite", will=("judge/will/polite", b"never")).leave()
    make("lost", will=("judge/will/lost", b"gone")).vanish()
    expect(reader.receive(), ("judge/will/lost", b"gone", 1, False))
    reader.leave()


def a_kept_session_brings_what_was_missed(make):
    """... at QoS 1 and 2, each in order (4.6), and nothing of a session that ended."""
    reader, writer = make("reader", clean=False), make("writer")
    reader.subscribe("judge/#", 2)
    reader.leave()
    for n in range(10):
        writer.publish("judge/missed", b"%d" % n, 1 + n // 5)
    reader = make("reader", clean=False)
    assert getattr(reader, "is_resumed", True)
    for n in range(10):
        expect(reader.receive(), ("judge/missed", b"%d" % n, 1 + n // 5, False))
    reader.leave()
    make("reader").leave()
    writer.publish("judge/missed", b"nobody", 1)
    reader = make("reader", clean=False)
    assert not getattr(reader, "is_resumed", False)
    reader.subscribe("judge/#", 1)
    writer.publish("judge/missed", b"after", 1)
    expect(reader.receive(), ("judge/missed", b"after", 1, False))
    reader.leave(), writer.leave()


def expect(came, wanted):
    assert came == wanted, f"{str(came)[:200]}, not {str(wanted)[:200]}"


def properties_travel(make):
    """MQTT 5's, from publisher to subscriber, user properties in order."""
    from paho.mqtt.packettypes import PacketTypes
    from paho.mqtt.properties import Properties

    client, sent = make("properties"), Properties(PacketTypes.PUBLISH)
    sent.PayloadFormatIndicator = 1
    sent.MessageExpiryInterval = 1000
    sent.ContentType, sent.ResponseTopic, sent.CorrelationData = "text/plain", "judge/answer", b"\0\xff"
    sent.UserProperty = [("b", "1"), ("a", "2"), ("b", "3")]
    client.subscribe("judge/properties", 2)
    client.publish("judge/properties", b"x", 2, properties=sent)
    client.receive()
    for name in ("PayloadFormatIndicator", "ContentType", "ResponseTopic", "CorrelationData", "UserProperty"):
        expect(getattr(client.properties, name), getattr(sent, name))
    assert 990 < client.properties.MessageExpiryInterval <= 1000
    client.leave()


# mosquitto's own


def mosquitto(program, port, *arguments):
    unpacked = pathlib.Path(__file__).resolve().parent.parent.parent / "target/peers" / program
    command = [str(unpacked if unpacked.exists() else program), "-p", str(port), "-V", "mqttv5", *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def mosquitto_rr_gets_an_answer(port):
    """Request and response: an answer to the topic, with the correlation data, that the request names."""
    from paho.mqtt.packettypes import PacketTypes
    from paho.mqtt.properties import Properties

    server = Paho5(port, "server")
    server.subscribe("judge/ask", 1)
    asking = mosquitto("mosquitto_rr", port, "-t", "judge/ask", "-e", "judge/answer", "-m", "what?", "-q", "1")
    expect(server.receive()[1], b"what?")
    answer = Properties(PacketTypes.PUBLISH)
    if hasattr(server.properties, "CorrelationData"):
        answer.CorrelationData = server.properties.CorrelationData
    server.publish(server.properties.ResponseTopic, b"that", 1, properties=answer)
    expect(asking.communicate(timeout=PATIENCE)[0].strip(), "that")
    server.leave()


def mosquitto_pub_sends_lines_and_mosquitto_sub_prints_them(port):
    lines = [f"line {n}" for n in range(100)]
    pub = mosquitto("mosquitto_pub", port, "-t", "judge/last", "-q", "2", "-r", "-m", "ready")
    assert pub.wait(PATIENCE) == 0
    sub = mosquitto("mosquitto_sub", port, "-t", "judge/#", "-q", "2", "-C", "101")
    expect(sub.stdout.readline().strip(), "ready")
    pub = mosquitto("mosquitto_pub", port, "-t", "judge/lines", "-q", "2", "-l")
    pub.communicate("\n".join(lines), timeout=PATIENCE)
    expect(sub.communicate(timeout=PATIENCE)[0].split("\n")[:-1], lines)
    assert sub.returncode == 0


SCENES = (
    messages_arrive_once_at_every_qos,
    large_messages_pass_whole,
    retained_messages_wait_for_who_subscribes,
    a_will_is_published_for_who_is_lost_and_for_nobody_else,
    a_kept_session_brings_what_was_missed,
)
PEERS = {"paho-mqtt": Paho, "paho-mqtt-5": Paho5, "aiomqtt": Aiomqtt, "amqtt": Amqtt}


def cases():
    for name, peer in PEERS.items():
        for scene in SCENES:
            yield f"{name}:{scene.__name__}", lambda port, peer=peer, scene=scene: scene(
                lambda *args, **kwargs: peer(port, *args, **kwargs)
            )
    yield "paho-mqtt-5:properties_travel", lambda port: properties_travel(lambda *args: Paho5(port, *args))
    for scene in (mosquitto_rr_gets_an_answer, mosquitto_pub_sends_lines_and_mosquitto_sub_prints_them):
        yield f"mosquitto:{scene.__name__}", scene


def main():
    if sys.argv[1] == "--list":
        print(*(name for name, _ in cases()), sep="\n")
        return
    with contextlib.suppress(KeyboardInterrupt):
        dict(cases())[sys.argv[1]](int(sys.argv[2]))


if __name__ == "__main__":
    main()
