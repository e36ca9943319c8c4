// mqtt.js through the scenes of `clients.py`: `node clients.mjs CASE PORT`. Every byte the broker sends is also
// read by `mqtt-packet`, which is stricter than its client.

import { once, on } from 'node:events'
import { connect as open } from 'node:net'
import { createRequire } from 'node:module'
import assert from 'node:assert/strict'

const require = createRequire(`${process.env.NODE_PATH}/`)
const mqtt = require('mqtt')
const mqttPacket = require('mqtt-packet')

const PATIENCE_MS = 20_000

class Client {
  static async make(port, version, clientId, options = {}) {
    const { clean = true, will } = options
    const five = version === 5
    const stream = () => {
      const socket = open(port, '127.0.0.1')
      const parser = mqttPacket.parser({ protocolVersion: version })
      parser.on('error', (error) => { throw error })
      socket.on('data', (data) => parser.parse(data))
      return socket
    }
    const client = new mqtt.MqttClient(stream, {
      clientId, clean, protocolVersion: version, protocolId: 'MQTT', reconnectPeriod: 0,
      ...(five && { properties: { sessionExpiryInterval: clean ? 0 : 100 } }),
      ...(will && { will: { topic: will[0], payload: Buffer.from(will[1]), qos: 1, retain: false } }),
    })
    const self = new Client()
    self.client = client
    self.messages = on(client, 'message')
    const [connack] = await once(client, 'connect')
    self.isResumed = connack.sessionPresent
    return self
  }

  async subscribe(topic, qos, options = {}) {
    const [granted] = await this.client.subscribeAsync(topic, { qos, ...options })
    assert.equal(granted.qos, qos)
  }

  publish(topic, payload, qos, retain = false, properties = undefined) {
    return this.client.publishAsync(topic, payload, { qos, retain, properties })
  }

  async expect(topic, payload, qos, retain) {
    const [gotTopic, gotPayload, packet] = (await this.messages.next()).value
    assert.deepEqual([gotTopic, gotPayload.length, packet.qos, packet.retain], [topic, payload.length, qos, retain])
    assert.ok(gotPayload.equals(Buffer.from(payload)), `another payload on ${topic}`)
    return packet
  }

  leave() {
    return this.client.endAsync()
  }

  vanish() {
    this.client.on('error', () => {})
    this.client.stream.destroy()
  }
}

const scenes = {
  async messages_arrive_once_at_every_qos(make) {
    const reader = await make('reader')
    const writer = await make('writer')
    await reader.subscribe('judge/+', 2)
    for (const qos of [0, 1, 2]) {
      const payloads = [Buffer.from([...Array(256).keys()]), ...[...Array(20).keys()].map((n) => `${n}`)]
      await Promise.all(payloads.map((payload) => writer.publish(`judge/${qos}`, payload, qos)))
      for (const payload of payloads) await reader.expect(`judge/${qos}`, payload, qos, false)
    }
    await writer.publish('judge/end', '', 1)
    await reader.expect('judge/end', '', 1, false)
    await Promise.all([reader.leave(), writer.leave()])
  },

  async large_messages_pass_whole(make) {
    const client = await make('large')
    const payload = Buffer.alloc(1024 * 1024, 'mpypi')
    await client.subscribe('judge/large', 1)
    await client.publish('judge/large', payload, 1)
    await client.expect('judge/large', payload, 1, false)
    await client.leave()
  },

  async retained_messages_wait_for_who_subscribes(make) {
    const writer = await make('writer')
    const reader = await make('reader')
    await writer.publish('judge/kept', 'first', 0, true)
    await writer.publish('judge/kept', 'second', 1, true)
    await reader.subscribe('judge/#', 1)
    await reader.expect('judge/kept', 'second', 1, true)
    await writer.publish('judge/kept', '', 1, true)
    await reader.expect('judge/kept', '', 1, false)
    await Promise.all([reader.leave(), writer.leave()])
  },

  async a_will_is_published_for_who_is_lost_and_for_nobody_else(make) {
    const reader = await make('reader')
    await reader.subscribe('judge/will/+', 1)
    await (await make('polite', { will: ['judge/will/polite', 'never'] })).leave()
    const lost = await make('lost', { will: ['judge/will/lost', 'gone'] })
    lost.vanish()
    await reader.expect('judge/will/lost', 'gone', 1, false)
    await reader.leave()
  },

  async a_kept_session_brings_what_was_missed(make) {
    const first = await make('reader', { clean: false })
    const writer = await make('writer')
    assert.ok(!first.isResumed)
    await first.subscribe('judge/#', 2)
    await first.leave()
    for (let n = 0; n < 10; n++) await writer.publish('judge/missed', `${n}`, n < 5 ? 1 : 2)
    const reader = await make('reader', { clean: false })
    assert.ok(reader.isResumed)
    for (let n = 0; n < 10; n++) await reader.expect('judge/missed', `${n}`, n < 5 ? 1 : 2, false)
    await Promise.all([reader.leave(), writer.leave()])
  },
}

const five = {
  async properties_and_identifiers_travel(make) {
    const client = await make('properties')
    const properties = {
      payloadFormatIndicator: true, contentType: 'text/plain', responseTopic: 'judge/answer',
      correlationData: Buffer.from([0, 255]), userProperties: { b: ['1', '3'], a: '2' },
    }
    await client.subscribe('judge/properties', 2, { properties: { subscriptionIdentifier: 268435455 } })
    await client.publish('judge/properties', 'x', 2, false, properties)
    const packet = await client.expect('judge/properties', 'x', 2, false)
    const { subscriptionIdentifier, ...rest } = packet.properties
    assert.equal(subscriptionIdentifier, 268435455)
    assert.deepEqual({ ...rest, userProperties: { ...rest.userProperties } }, properties)
    await client.leave()
  },

  async retained_messages_come_as_the_subscription_says(make) {
    const writer = await make('writer')
    await writer.publish('judge/kept', 'x', 1, true)
    const reader = await make('reader')
    await reader.subscribe('judge/kept', 1, { rh: 2, rap: true })
    await writer.publish('judge/kept', 'y', 1, true)
    await reader.expect('judge/kept', 'y', 1, true)
    await reader.subscribe('judge/kept', 1, { rh: 1 })
    await reader.subscribe('judge/kept', 1, { rh: 0 })
    await reader.expect('judge/kept', 'y', 1, true)
    await writer.subscribe('judge/own', 1, { nl: true })
    await writer.publish('judge/own', 'mine', 1)
    await reader.publish('judge/own', 'theirs', 1)
    await writer.expect('judge/own', 'theirs', 1, false)
    await Promise.all([reader.leave(), writer.leave()])
  },
}

const cases = {}
for (const [name, scene] of Object.entries(scenes)) {
  for (const version of [4, 5]) cases[`mqtt.js-${version}:${name}`] = [version, scene]
}
for (const [name, scene] of Object.entries(five)) cases[`mqtt.js-5:${name}`] = [5, scene]

const [name, port] = process.argv.slice(2)
if (name === '--list') {
  console.log(Object.keys(cases).join('\n'))
} else {
  setTimeout(() => { throw new Error('nothing came') }, PATIENCE_MS).unref()
  const [version, scene] = cases[name]
  await scene((id, options) => Client.make(Number(port), version, id, options))
  process.exit(0)
}
