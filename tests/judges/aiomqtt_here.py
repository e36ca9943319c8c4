"""A pytest plugin: aiomqtt's tests, which mean `test.mosquitto.org`, go to the broker on port `MPYPI_PORT`."""

import os
import socket

HERE = ("127.0.0.1", int(os.environ["MPYPI_PORT"]))
_connect = socket.create_connection


def create_connection(address, *args, **kwargs):
    # The other ports are for TLS and WebSocket.
    return _connect(HERE if address == ("test.mosquitto.org", 1883) else address, *args, **kwargs)


socket.create_connection = create_connection
