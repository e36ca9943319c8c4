# A MicroPython board with the client that others wrote for ThingsBoard: `board.py PORT TOKEN`.
import json
import sys

from uthingsboard.client import TBDeviceMqttClient

client = TBDeviceMqttClient("127.0.0.1", port=int(sys.argv[1]), access_token=sys.argv[2], qos=1)
assert client.connect() == 0
client.send_telemetry({"temperature": 21.5})
client.send_attributes({"fw_title": "dev", "fw_version": "1.10"}, qos=1)
read = []
client.request_attributes(["fw_version"], ["fw_version", "fw_size", "no"], read.append)
while not read:
    client.wait_msg()
told = []
client.subscribe_to_attribute("fw_version", told.append)
# The test publishes the next release when it sees this: nobody is told of what was before.
client.send_attributes({"listens": True}, qos=1)
print(json.dumps(read[0]))
while not told:
    client.wait_msg()
print(told[0]["fw_version"])
client.disconnect()
