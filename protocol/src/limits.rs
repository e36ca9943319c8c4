//! Every limit of the wire format, by name. Programs may lower them; none raises them silently.

/// Largest MQTT packet, in bytes: fixed header, topic, properties and payload together.
pub const PACKET: usize = 16 * 1024 * 1024;

/// Largest update list, in bytes.
pub const LIST: usize = 1024 * 1024;

/// Most entries in one update list.
pub const LIST_ENTRIES: usize = 16 * 1024;

/// Largest package, in bytes.
pub const PACKAGE: u64 = 8 * 1024 * 1024;

/// Most chunks of one package.
pub const CHUNKS: usize = 1024;

/// Smallest size of a package's chunks, in bytes: below it there is more of topics and packets than of bytes. The
/// largest is [`PACKAGE`]. The last chunk may be smaller.
pub const CHUNK_MIN: u64 = 1024;

/// Longest topic name or filter, in bytes of UTF-8.
pub const TOPIC: usize = 1024;

/// Most levels in a topic name or filter.
pub const TOPIC_LEVELS: usize = 64;

/// Longest path of a file on a device, in bytes of UTF-8. Leaves room for the rest of a package's topic.
pub const PATH: usize = 512;

/// Most components in a path: what [`TOPIC_LEVELS`] leaves beside `mpypi/packages/src/` and the digest.
pub const PATH_COMPONENTS: usize = TOPIC_LEVELS - 4;

/// Longest channel name, in bytes.
pub const CHANNEL_NAME: usize = 64;

/// Longest node name, in bytes of UTF-8.
pub const NODE_NAME: usize = 128;

/// Longest package name, version, tag or other short text of an entry, in bytes of UTF-8.
pub const TEXT: usize = 128;

/// Largest `info` or `state` message, in bytes.
pub const NODE_MESSAGE: usize = 64 * 1024;

/// Most filters in one SUBSCRIBE: what every known broker accepts (AWS IoT allows eight).
pub const SUBSCRIBE_FILTERS: usize = 8;

/// Longest name of a key, in bytes.
pub const KEY_NAME: usize = 64;

/// Largest root, in bytes: a device of a few KiB keeps it and walks over it.
pub const ROOT: usize = 32 * 1024;

/// Most keys in one root.
pub const ROOT_KEYS: usize = 32;

/// Most delegations in one root.
pub const DELEGATIONS: usize = 64;

/// Most signatures of one root.
pub const ROOT_SIGNATURES: usize = 16;

/// Most releases that a list revokes.
pub const REVOKED: usize = 64;

/// Largest answer to a challenge, in bytes.
pub const TIME_ANSWER: usize = 4096;

/// Longest nonce of a challenge, in bytes.
pub const NONCE: usize = 64;

/// Longest query of a rollout, in bytes of UTF-8.
pub const QUERY: usize = 512;

/// Most parentheses and `not`s inside each other in a query: a device reads it on a small stack.
pub const QUERY_DEPTH: usize = 8;

/// Longest jitter of a rollout, in seconds: a day.
pub const JITTER: u32 = 24 * 60 * 60;

/// Most steps of a rollout.
pub const ROLLOUT_STEPS: usize = 32;
