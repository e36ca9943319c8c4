//! Every limit of the broker, by name, with its default.

use std::time::Duration;

use mpypi_protocol::limits;

/// What a broker allows. Each is answered by a clear refusal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Largest packet, in bytes.
    pub packet: usize,
    /// Largest CONNECT, in bytes: what a stranger may make us hold.
    pub connect_packet: usize,
    /// Largest package, in bytes.
    pub package: u64,
    /// Clients connected at once.
    pub clients: usize,
    /// From the TCP connection to a whole CONNECT.
    pub connect: Duration,
    /// How long a client may take none of the bytes that wait for it.
    pub write_stall: Duration,
    /// How long the start of a packet may wait for its end, beyond what [`Limits::slowest_upload`] grants.
    pub read_stall: Duration,
    /// The slowest upload of a large packet that is waited for, in bytes per second.
    pub slowest_upload: u64,
    /// QoS 1 and 2 messages of one client that wait for the index at once; more are not read.
    pub inbound_window: u16,
    /// QoS 1 messages sent to one client that it has not acknowledged; more wait in its queue.
    pub outbound_window: u16,
    /// Live messages that wait for one client.
    pub queue_messages: usize,
    /// Bytes of live messages that wait for one client.
    pub queue_bytes: usize,
    /// Bytes of large packets being received from all clients together.
    pub inbound_bytes: usize,
    /// Subscriptions of one client.
    pub subscriptions: usize,
    /// Retained messages in the index.
    pub retained: u64,
    /// For everything to stop after a signal.
    pub shutdown: Duration,
}

impl Limits {
    /// Packets up to this many bytes are received without a place in [`Limits::inbound_bytes`].
    pub const SMALL_PACKET: usize = 64 * 1024;
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            packet: limits::PACKET,
            connect_packet: 128 * 1024,
            package: limits::PACKAGE,
            clients: 100_000,
            connect: Duration::from_secs(10),
            write_stall: Duration::from_secs(30),
            read_stall: Duration::from_secs(30),
            slowest_upload: 8 * 1024,
            inbound_window: 64,
            outbound_window: 64,
            queue_messages: 256,
            queue_bytes: 1024 * 1024,
            inbound_bytes: 256 * 1024 * 1024,
            subscriptions: 1024,
            retained: 1_000_000,
            shutdown: Duration::from_secs(10),
        }
    }
}
