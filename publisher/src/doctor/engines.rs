//! Which broker it is, and what is known of such.

use serde::Serialize;

use super::{Fate, Observations};
use crate::doctor::judge::Check;

/// A broker that is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Engine {
    /// Ours.
    Mpypi,
    /// Eclipse mosquitto.
    Mosquitto,
    /// NATS with JetStream.
    Nats,
    /// EMQX.
    Emqx,
    /// HiveMQ.
    Hivemq,
    /// VerneMQ.
    Vernemq,
    /// AWS IoT Core.
    Aws,
    /// RabbitMQ with its MQTT plugin.
    Rabbitmq,
}

/// Which broker it seems to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Recognised {
    /// Whose.
    pub engine: Engine,
    /// Its version, if it says.
    pub version: Option<String>,
    /// What gives it away.
    pub by: &'static str,
}

/// Where a piece of advice comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// It was measured, and tests of this project show it.
    Tested,
    /// Its manual says so; it was not tried.
    Manual,
}

/// Something to know about a broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Advice {
    /// What.
    pub text: &'static str,
    /// Who says so.
    pub source: Source,
}

impl Engine {
    /// What people call it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Engine::Mpypi => "mpypi-broker",
            Engine::Mosquitto => "mosquitto",
            Engine::Nats => "NATS",
            Engine::Emqx => "EMQX",
            Engine::Hivemq => "HiveMQ",
            Engine::Vernemq => "VerneMQ",
            Engine::Aws => "AWS IoT",
            Engine::Rabbitmq => "RabbitMQ",
        }
    }

    /// What to know about it before devices depend on it.
    #[must_use]
    pub fn advice(self) -> Vec<Advice> {
        let tested = |text| Advice { text, source: Source::Tested };
        let manual = |text| Advice { text, source: Source::Manual };
        match self {
            Engine::Mpypi => vec![tested(
                "what it acknowledged survives `kill -9` and power cuts; lists, packages and signatures are checked at the door",
            )],
            Engine::Mosquitto => vec![
                tested(
                    "`kill -9` loses everything since the last save: set `autosave_on_changes true` and `autosave_interval 1`",
                ),
                tested(
                    "a bridge in direction `both` puts old lists back when an edge returns: use `in`, with `cleansession false`",
                ),
                tested("a denied publish is acknowledged to MQTT 3.1.1, and dropped; MQTT 5 is told"),
                tested(
                    "packages asked for by a wildcard are dropped beyond its queue; `max_queued_messages 1000` helps tools of others",
                ),
            ],
            Engine::Nats => vec![
                tested("2.10 or later: 2.9 refuses dots in topics, and package topics have some"),
                tested(
                    "a killed node can take acknowledged messages with it, and another may go on serving what was: name all nodes, so that `mpypi publish` reads back through each, and restart a node that it calls stale",
                ),
                tested("a denied publish is acknowledged, and dropped"),
                tested(
                    "a wildcard delivers nothing once more than 64 MB (`max_pending`) wait; agents ask by exact topic and are not concerned",
                ),
                tested(
                    "a subscription at QoS 1 costs 10 to 30 times what one at QoS 0 costs; agents subscribe at QoS 0",
                ),
                tested("`write_deadline` has to be minutes: slow devices are cut off otherwise"),
                tested(
                    "`max_payload` is 1 MB unless it is set, and is the largest package: 8MB in `deploy/nats/node.conf`",
                ),
            ],
            Engine::Emqx => vec![
                manual(
                    "`mqtt.max_packet_size` and `retainer.max_payload_size` are 1 MB unless they are set: raise both for larger packages",
                ),
                manual(
                    "retained messages are replicated in a cluster; set `retainer.backend.storage_type = disc`",
                ),
                manual("only clients on its own host may read `$SYS`, unless the rules say otherwise"),
            ],
            Engine::Hivemq => vec![
                manual("retained messages are persisted and replicated in a cluster"),
                manual(
                    "it takes 10 messages at a time without an acknowledgement, unless `server-receive-maximum` says otherwise: publishing is slower, not less sure",
                ),
            ],
            Engine::Vernemq => vec![
                manual(
                    "retained messages are replicated; set `max_message_size` to the largest package or 0",
                ),
                manual(
                    "while its cluster is split it takes no messages, unless `allow_publish_during_netsplit` says so: leave it off",
                ),
            ],
            Engine::Aws => vec![
                manual(
                    "a message is 128 KB at most, and that cannot be raised: larger packages go out in chunks",
                ),
                manual(
                    "a topic has seven slashes at most: files below `src/` can be three folders deep, with package topics",
                ),
                manual(
                    "a policy has to grant Connect, Publish, RetainPublish, Subscribe and Receive below `mpypi/`",
                ),
                manual(
                    "a connection has 50 subscriptions at most, and a SUBSCRIBE 8 filters: agents keep to both",
                ),
            ],
            Engine::Rabbitmq => vec![
                manual("retained messages stay on the node that took them: a cluster of it is no index"),
                manual(
                    "a dot in a topic comes back as a slash: packages do not come back under their topics. Take another broker",
                ),
                manual(
                    "retained messages do not come for wildcards: `mpypi status` and rollouts see no devices",
                ),
            ],
        }
    }

    /// What to set there for this check to come out better, if there is something.
    #[must_use]
    pub fn setting(self, check: Check) -> Option<&'static str> {
        Some(match (self, check) {
            (Engine::Mpypi, Check::Largest) => {
                "raise `packet`, and `package` if it is set, in `[limits]` of broker.toml"
            }
            (Engine::Mosquitto, Check::Largest) => {
                "raise `max_packet_size` and `message_size_limit` in mosquitto.conf"
            }
            (Engine::Nats, Check::Largest) => "raise `max_payload` in its settings",
            (Engine::Emqx, Check::Largest) => "raise `mqtt.max_packet_size` and `retainer.max_payload_size`",
            (Engine::Hivemq, Check::Largest) => {
                "raise `max-packet-size` in `<mqtt><packets>` of its config.xml"
            }
            (Engine::Vernemq, Check::Largest) => "raise `max_message_size` in vernemq.conf",
            (Engine::Rabbitmq, Check::Largest) => "raise `mqtt.max_packet_size_authenticated`",
            (Engine::Aws, Check::Largest) => "it cannot be raised there",
            (Engine::Mosquitto, Check::Retained) => {
                "`retain_available` must not be `false` in mosquitto.conf"
            }
            (Engine::Emqx, Check::Retained) => {
                "`mqtt.retain_available` and `retainer.enable` have to be true"
            }
            _ => return None,
        })
    }
}

/// Which broker it seems to be.
#[must_use]
pub fn recognise(seen: &Observations) -> Option<Recognised> {
    let found = |engine, version: Option<&str>, by| {
        Some(Recognised { engine, version: version.map(str::to_owned), by })
    };
    if let Some(text) = seen.sys.get("$SYS/broker/version") {
        let named = [(Engine::Mpypi, "mpypi-broker version "), (Engine::Mosquitto, "mosquitto version ")];
        for (engine, prefix) in named {
            if let Some(version) = text.strip_prefix(prefix) {
                return found(engine, Some(version), "$SYS/broker/version");
            }
        }
    }
    let beside = |end: &str| {
        let is_it = |topic: &&String| topic.starts_with("$SYS/brokers/") && topic.ends_with(end);
        seen.sys.keys().find(is_it).map(|topic| seen.sys[topic].as_str())
    };
    if let Some(version) = beside("/version") {
        return found(Engine::Emqx, Some(version), "$SYS/brokers");
    }
    let url = seen.addresses.get(seen.examined).map_or("", |address| address.url.as_str());
    if url.contains(".iot.") && url.contains(".amazonaws.com") {
        return found(Engine::Aws, None, "its host's name");
    }
    if let Some(greeting) = &seen.greeting {
        let ours = mpypi_protocol::greeting::SERVES;
        if greeting.user_properties.iter().any(|(name, _)| name == ours) {
            return found(Engine::Mpypi, None, "its greeting");
        }
        let id = greeting.assigned_client_id.as_deref().unwrap_or_default();
        // As their sources make such ids; AWS documents its own.
        let named = [(Engine::Hivemq, "hmq_"), (Engine::Aws, "$GEN/"), (Engine::Mosquitto, "auto-")];
        for (engine, prefix) in named {
            if id.starts_with(prefix) {
                return found(engine, None, "the client ids that it gives");
            }
        }
    }
    if matches!(seen.dots, Fate::Renamed { .. }) {
        return found(Engine::Rabbitmq, None, "dots that come back as slashes");
    }
    let address = seen.addresses.get(seen.examined)?;
    let is_four_alone = address.four.is_none() && address.five.is_some();
    if is_four_alone && matches!(seen.spaces, Fate::Closed { .. }) {
        return found(Engine::Nats, None, "MQTT 3.1.1 alone, and no spaces in topics");
    }
    None
}
