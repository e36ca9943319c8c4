"""mosquitto's broker tests, before our broker.

Every case of the suite imports `mosq_test`. The runner puts this file in the place of the suite's own, which
it moves to `mosq_test_original.py`; what starts a broker and what compares packets is replaced here, the rest
is the suite's. Where a case speaks MQTT 3.1 as well, it speaks 3.1.1 twice: ours does not serve 3.1.
"""

import atexit
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import types

import mosq_test_original as original
import psutil

sys.path.insert(0, os.environ["MPYPI_JUDGES"])
import wire  # noqa: E402

# What our broker does anyway, or what makes no difference to a client.
GRANTED = {"listener", "port", "allow_anonymous true", "persistence", "persistence_file", "log_type", "sys_interval"}

PATIENCE = 20

_ids = {}
_folder = tempfile.mkdtemp(prefix="mpypi-judge-")
atexit.register(shutil.rmtree, _folder, ignore_errors=True)


class Socket(socket.socket):
    """A socket that knows packets."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.line = wire.Line(super().recv)

    def connect(self, address):
        super().connect(address)
        self.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, data, *flags):
        self.line.note(data)
        super().sendall(wire.translate(as_311(data, self.line.version), ids(self)))
        return len(data)

    def recv(self, count, *flags):
        return self.line.bytes(count)


class Broker:
    """Our broker, as the suite knows a process."""

    def __init__(self, port, data):
        self.port = port
        self.log = tempfile.TemporaryFile()
        command = [os.environ["MPYPI_BROKER"], "serve", "--listen", f"127.0.0.1:{port}", "--data", data]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log)
        if not self.process.stdout.readline().startswith(b"listening on"):
            self.process.kill()
            raise OSError(self.communicate()[1].decode())
        atexit.register(self.process.kill)

    @property
    def pid(self):
        return self.process.pid

    @property
    def returncode(self):
        return self.process.returncode

    def poll(self):
        return self.process.poll()

    def terminate(self):
        """Asks it to stop, once it has read what was sent to it: it answers what comes later only then."""
        if self.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)) as last:
                last.settimeout(PATIENCE)
                last.sendall(original.gen_connect("mpypi-judge-last") + 2 * original.gen_pingreq())
                last.recv(64)
        self.process.terminate()

    def kill(self):
        self.process.kill()

    def wait(self, timeout=PATIENCE):
        return self.process.wait(timeout)

    def communicate(self, *_, **__):
        self.process.wait(PATIENCE)
        self.log.seek(0)
        return b"", self.log.read()


def start_broker(filename, cmd=None, port=0, use_conf=False, expect_fail=False, nolog=False):
    """Starts our broker with what the case asks of mosquitto, or says that ours cannot be asked that."""
    kept = None
    if use_conf or (cmd is None and port == 0):
        with open(filename.replace(".py", ".conf"), encoding="utf-8") as file:
            settings = [line.strip() for line in file if line.strip() and not line.startswith("#")]
        foreign = [one for one in settings if one not in GRANTED and one.split()[0] not in GRANTED]
        if foreign:
            print(f"mosquitto's configuration: {'; '.join(foreign)}")
            sys.stdout.flush()
            os._exit(1)
        if "persistence true" in settings:
            kept = next((one.split()[1] for one in settings if one.startswith("persistence_file ")), None)
    # A case that keeps mosquitto's file keeps our index: the file says where that is.
    if kept and os.path.exists(kept):
        with open(kept, encoding="utf-8") as file:
            return Broker(port or 1888, file.read())
    data = tempfile.mkdtemp(dir=_folder)
    if kept:
        with open(kept, "w", encoding="utf-8") as file:
            file.write(data)
    return Broker(port or 1888, data)


def as_311(data, version):
    """A CONNECT of MQTT 3.1, or a PUBREL with its duplicate flag, as one of 3.1.1; other bytes as they are."""
    if version == 3 and data[:1] == b"\x6a":
        return b"\x62" + data[1:]
    if data[:1] == b"\x10" and data[2:11] == b"\0\6MQIsdp\3":
        return bytes([data[0], data[1] - 2]) + b"\0\4MQTT\4" + data[11:]
    return data


def ids(sock):
    return _ids.setdefault(sock.line.client_id, {})


def expect_packet(sock, name, expected):
    wrong = sock.line.expect(expected, ids(sock))
    if wrong:
        print(f"FAIL: {name}: {wrong}")
        raise original.TestError(wrong)
    return True


def receive_unordered(sock, recv1_packet, recv2_packet, error_string):
    """Two packets in any order."""
    try:
        came = [sock.line.packet(), sock.line.packet()]
    except (TimeoutError, wire.Closed, wire.Malformed) as error:
        print(f"FAIL: {error_string}: {error!r}")
        raise original.TestError(error_string) from error
    for wanted in ([recv1_packet, recv2_packet], [recv2_packet, recv1_packet]):
        wanted = [wire.decode(*wire.split(one)[0][0], sock.line.version) for one in wanted]
        tried = dict(ids(sock))
        if not any(wire.difference(one, other, tried) for one, other in zip(wanted, came)):
            ids(sock).update(tried)
            return
    print(f"FAIL: {error_string}: received {came[0]}, {came[1]}")
    raise ValueError(error_string)


def memory_info(process):
    """Resident memory where a case asks for virtual: ours reserves far more than it uses."""
    return types.SimpleNamespace(vms=_memory_info(process).rss)


_memory_info, psutil.Process.memory_info = psutil.Process.memory_info, memory_info
socket.socket = Socket
for replaced in (start_broker, expect_packet, receive_unordered):
    setattr(original, replaced.__name__, replaced)
sys.modules["mosq_test"] = original
