//! rumqttc, whose clients run in this process, judges the broker; `tests/judges` holds all other judges.

use std::collections::BTreeMap;

use mpypi_tests::{PATIENCE, Server, World};

/// Messages at each QoS.
const COUNT: u8 = 50;

/// How often each payload came, by topic.
type Seen = BTreeMap<(String, u8), usize>;

fn all_once() -> Seen {
    let expected = |qos| (0..COUNT).map(move |n| ((format!("judge/{qos}"), n), 1));
    (0..3).flat_map(expected).collect()
}

#[test]
fn rumqttc_gets_what_it_publishes_once_at_every_qos_in_mqtt_3_1_1() {
    use rumqttc::{Client, Event, MqttOptions, Packet, mqttbytes::qos};
    let world = World::new();
    let server = Server::start(&world);
    let mut options = MqttOptions::new("rumqttc", "127.0.0.1", server.address.port());
    options.set_keep_alive(2 * PATIENCE); // so that nothing else comes while nothing comes
    let (client, mut connection) = Client::new(options, 3 * usize::from(COUNT) + 1);
    client.subscribe("judge/+", qos(2).unwrap()).unwrap();
    let mut seen = Seen::new();
    while seen != all_once() {
        match connection.recv_timeout(PATIENCE).expect("a message").expect("a connection") {
            Event::Incoming(Packet::SubAck(_)) => {
                for (level, n) in (0..3).flat_map(|level| (0..COUNT).map(move |n| (level, n))) {
                    let topic = format!("judge/{level}");
                    client.publish(topic, qos(level).unwrap(), false, [n]).unwrap();
                }
            }
            Event::Incoming(Packet::Publish(publish)) => {
                let times = seen.entry((publish.topic, publish.payload[0])).or_default();
                *times += 1;
                assert_eq!(*times, 1);
            }
            _ => {}
        }
    }
}

#[test]
fn rumqttc_gets_what_it_publishes_once_at_every_qos_in_mqtt_5() {
    use rumqttc::v5::{
        Client, Event, MqttOptions,
        mqttbytes::{qos, v5::Packet},
    };
    let world = World::new();
    let server = Server::start(&world);
    let mut options = MqttOptions::new("rumqttc", "127.0.0.1", server.address.port());
    options.set_keep_alive(2 * PATIENCE); // so that nothing else comes while nothing comes
    let (client, mut connection) = Client::new(options, 3 * usize::from(COUNT) + 1);
    client.subscribe("judge/+", qos(2).unwrap()).unwrap();
    let mut seen = Seen::new();
    while seen != all_once() {
        match connection.recv_timeout(PATIENCE).expect("a message").expect("a connection") {
            Event::Incoming(Packet::SubAck(_)) => {
                for (level, n) in (0..3).flat_map(|level| (0..COUNT).map(move |n| (level, n))) {
                    let topic = format!("judge/{level}");
                    client.publish(topic, qos(level).unwrap(), false, vec![n]).unwrap();
                }
            }
            Event::Incoming(Packet::Publish(publish)) => {
                let topic = String::from_utf8(publish.topic.to_vec()).unwrap();
                let times = seen.entry((topic, publish.payload[0])).or_default();
                *times += 1;
                assert_eq!(*times, 1);
            }
            _ => {}
        }
    }
}
