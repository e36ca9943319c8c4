"""ThingsBoard's own SDK for Python updates once: `sdk.py mqtt|http ADDRESS TOKEN CHUNK_SIZE FOLDER`.

Over MQTT it ends after one update, or when a checksum was wrong so often as `--failures` says. Prints the states that it
sent, as JSON; the image lies in the folder, as `dev`, whatever the SDK thought of it.
"""

import argparse
import json
import os
import sys
import threading
import time

PATIENCE = 60


def by_mqtt(options):
    import tb_device_mqtt
    from tb_device_mqtt import TBDeviceMqttClient, TBFirmwareState

    host, port = options.address.rsplit(":", 1)
    states, ended = [], threading.Event()

    class Device(TBDeviceMqttClient):
        def send_telemetry(self, telemetry, *more, **options_of_it):
            told = super().send_telemetry(telemetry, *more, **options_of_it)
            states.append(telemetry["fw_state"])
            if options.failures and states.count("FAILED") == options.failures:
                ended.set()
            return told

    def received(client, image, version):
        client.update_firmware_info(state=TBFirmwareState.UPDATING)
        with open("dev", "wb") as file:
            file.write(image)
        client.update_firmware_info(title=client.firmware_info["fw_title"], version=version, state=TBFirmwareState.UPDATED)
        ended.set()

    # It waits a second after each state, for people to see it.
    tb_device_mqtt.sleep = lambda seconds, wait=tb_device_mqtt.sleep: wait(min(seconds, 0.05))
    device = Device(host, int(port), username=options.token, chunk_size=options.chunk)
    device.set_on_firmware_received_callback(received)
    device.connect()
    # Its callback comes too late for a fast broker.
    since = time.monotonic()
    while not device.is_connected():
        assert time.monotonic() - since < PATIENCE, "no connection"
        time.sleep(0.01)
    device.get_firmware_update()
    assert ended.wait(PATIENCE), states
    # At QoS 1, so all before it has arrived.
    device.send_attributes({"is_done": True}).get()
    device.disconnect()
    device.stop()
    return states


def by_http(options):
    import tb_device_http
    from tb_device_http import TBHTTPDevice

    states = []
    tb_device_http.time.sleep = lambda _: None

    class Device(TBHTTPDevice):
        def send_telemetry(self, telemetry, *_, **__):
            states.append(telemetry.get("fw_state"))
            super().send_telemetry(telemetry, queued=False)

    device = Device("http://" + options.address, options.token, chunk_size=options.chunk)
    assert device.test_connection()
    device.get_firmware_update()
    return states


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=("mqtt", "http"))
    parser.add_argument("address")
    parser.add_argument("token")
    parser.add_argument("chunk", type=int)
    parser.add_argument("folder")
    parser.add_argument("--failures", type=int, default=0)
    options = parser.parse_args()
    os.chdir(options.folder)
    states = {"mqtt": by_mqtt, "http": by_http}[options.way](options)
    json.dump({"states": states}, sys.stdout)


if __name__ == "__main__":
    main()
