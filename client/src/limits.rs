//! Every limit of a connection, by name. The wire's own are in [`mpypi_protocol::limits`].

use std::time::Duration;

/// Most addresses of brokers at a time.
pub const BROKERS: usize = 16;

/// The smallest largest packet that a broker may be said to take, in bytes: a chunk of the smallest size, its topic and more fit in.
pub const PACKET_LEAST: u64 = 2 * mpypi_protocol::limits::CHUNK_MIN;

/// How long several brokers may take until they agree on what was published, unless told otherwise: longer than a cluster
/// takes to choose who leads when a node is gone, and a node to come back.
pub const AGREE: Duration = Duration::from_secs(60);

/// Connecting, from the look-up of the name to the broker's greeting.
pub const CONNECT: Duration = Duration::from_secs(5);

/// A broker that takes not one byte for so long, while there are some for it, is given up.
pub const STALL: Duration = Duration::from_secs(30);

/// A broker to which nothing can be sent any more may still say why, for so long.
pub const LAST_WORDS: Duration = Duration::from_secs(1);

/// The end of a stream, which TLS announces, may take so long.
pub const GOODBYE: Duration = Duration::from_secs(1);

/// A paced connection takes at once, at most, what is its due for so long.
pub const BURST: Duration = Duration::from_millis(250);

/// Room for what is read at a time, in bytes; a larger packet gets what it needs.
pub const READ: usize = 8 * 1024;

/// Requests are written together up to about so many bytes.
pub const WRITE: usize = 64 * 1024;

/// Largest file of certificates or of a key, in bytes. A system's whole collection has a quarter of it.
pub const PEM: u64 = 1024 * 1024;

/// The body of an answer over HTTP may take so long in all.
pub const BODY: Duration = Duration::from_secs(600);
