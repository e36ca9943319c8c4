//! Every limit of the broker, by name, with its default.

use std::time::Duration;

use mpypi_protocol::limits;
use serde::{Deserialize, Serialize};

use crate::settings::SettingsError;

const DAY: Duration = Duration::from_secs(24 * 3600);

/// What a broker allows. Each is answered by a clear refusal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Largest packet, in bytes.
    pub packet: usize,
    /// Largest packet other than a PUBLISH, in bytes: also what a stranger may make us hold.
    pub control_packet: usize,
    /// Largest properties of a packet, in bytes. In memory they take ten times as much.
    pub properties: usize,
    /// Longest client id, in bytes.
    pub client_id: usize,
    /// Largest package, in bytes.
    pub package: u64,
    /// Largest payload that is not retained, in bytes: it waits for its receivers in memory.
    pub live_payload: usize,
    /// Clients connected at once.
    pub clients: usize,
    /// Connections at once that are not, or no longer, those of clients.
    pub strangers: usize,
    /// From the TCP connection to a whole CONNECT.
    #[serde(with = "crate::settings::duration")]
    pub connect: Duration,
    /// How long a client may take none of the bytes that wait for it.
    #[serde(with = "crate::settings::duration")]
    pub write_stall: Duration,
    /// How long the start of a packet may wait for its end, beyond what [`Limits::slowest_upload`] grants.
    #[serde(with = "crate::settings::duration")]
    pub read_stall: Duration,
    /// The slowest upload of a large packet that is waited for, in bytes per second.
    pub slowest_upload: u64,
    /// While others wait for a place in [`Limits::inbound_bytes`], a large packet must have come at this rate so
    /// far, in bytes per second, but for [`Limits::contended_stall`].
    pub slowest_contended_upload: u64,
    /// How far a large packet may be behind while others wait for its place.
    #[serde(with = "crate::settings::duration")]
    pub contended_stall: Duration,
    /// QoS 1 and 2 messages of one client that wait for the index at once; more are not read.
    pub inbound_window: u16,
    /// Topic aliases that an MQTT 5 client may give on one connection.
    pub topic_aliases: u16,
    /// QoS 2 messages that a client has not released. MQTT 5 clients keep to [`Limits::inbound_window`].
    pub unreleased: usize,
    /// QoS 1 messages sent to one client that it has not acknowledged; more wait in its queue.
    pub outbound_window: u16,
    /// Live messages that wait for one client.
    pub queue_messages: usize,
    /// Bytes of live messages that wait for one client.
    pub queue_bytes: usize,
    /// HTTP connections at once; more wait to be accepted.
    pub http_clients: usize,
    /// For the head of an HTTP request to come, also of the next on a connection that stays.
    #[serde(with = "crate::settings::duration")]
    pub http_head: Duration,
    /// Largest body of an HTTP request that is no upload, in bytes.
    pub http_body: usize,
    /// HTTP clients that listen for events at once.
    pub http_events: usize,
    /// Bytes of large packets being received from all clients together.
    pub inbound_bytes: usize,
    /// Subscriptions of one client.
    pub subscriptions: usize,
    /// Sessions kept without, or beyond, a connection.
    pub sessions: usize,
    /// The longest time that a session is kept for a client that does not come back.
    #[serde(with = "crate::settings::duration")]
    pub session_expiry: Duration,
    /// QoS 1 and 2 messages that wait in the index for one kept session; with more it is given up.
    pub session_messages: usize,
    /// Bytes of such messages in the database; those in blobs do not count.
    pub session_bytes: usize,
    /// Retained messages in the index.
    pub retained: u64,
    /// Bytes of the index's disk that messages must leave free. What replaces a small message may use half of
    /// them, what clears one all.
    pub disk_reserve: u64,
    /// How often garbage is collected; zero for never.
    #[serde(with = "crate::settings::duration")]
    pub gc_every: Duration,
    /// What the last so many lists of each channel name is no garbage.
    pub gc_keep: usize,
    /// How long a package stays after it was last uploaded or named.
    #[serde(with = "crate::settings::duration")]
    pub gc_grace: Duration,
    /// How long a Mpy-BLOX node may take from its last package to its new start.
    #[serde(with = "crate::settings::duration")]
    pub mpyblox_patience: Duration,
    /// For everything to stop after a signal.
    #[serde(with = "crate::settings::duration")]
    pub shutdown: Duration,
}

impl Limits {
    /// Packets up to this many bytes are received without a place in [`Limits::inbound_bytes`].
    pub const SMALL_PACKET: usize = 64 * 1024;

    /// What a PUBLISH needs around its package, in bytes.
    const PACKET_OVERHEAD: usize = 64 * 1024;

    /// Fails if a broker could do nothing with these limits.
    ///
    /// # Errors
    /// Names the limit.
    pub fn check(&self) -> Result<(), SettingsError> {
        let wrong = |name, problem: String| Err(SettingsError::Limit { name, problem });
        // 2.1.4: what a remaining length can say.
        const LARGEST: usize = 268_435_455;
        if self.packet <= Self::PACKET_OVERHEAD || self.packet > LARGEST {
            return wrong("packet", format!("is from {} to {LARGEST} bytes", Self::PACKET_OVERHEAD + 1));
        }
        let most = (self.packet - Self::PACKET_OVERHEAD) as u64;
        if self.package > most {
            return wrong("package", format!("is at most {most}, what fits into a packet"));
        }
        if self.inbound_bytes < self.packet {
            return wrong("inbound_bytes", format!("is at least {}, the largest packet", self.packet));
        }
        let needed = [
            ("control_packet", self.control_packet),
            ("properties", self.properties),
            ("client_id", self.client_id),
            ("clients", self.clients),
            ("strangers", self.strangers),
            ("http_clients", self.http_clients),
            ("http_body", self.http_body),
            ("inbound_window", self.inbound_window.into()),
            ("unreleased", self.unreleased),
            ("outbound_window", self.outbound_window.into()),
            ("queue_messages", self.queue_messages),
            ("queue_bytes", self.queue_bytes),
            ("subscriptions", self.subscriptions),
            ("session_messages", self.session_messages),
            ("session_bytes", self.session_bytes),
        ];
        match needed.into_iter().find(|(_, value)| *value == 0) {
            Some((name, _)) => wrong(name, "is at least 1".to_owned()),
            None => Ok(()),
        }
    }

    /// Lowers the numbers of clients, strangers and HTTP connections to what a process with so many `files` can hold,
    /// and leaves some files for the index: without them, messages could be neither kept nor read.
    pub fn fit_into(&mut self, files: usize) {
        /// Open at once: the database, blobs being read and written, listeners, the runtime's own.
        const OURS: usize = 256;
        let sockets = files.saturating_sub(OURS).max(4);
        // Each may have a file open that it downloads.
        self.http_clients = self.http_clients.min(sockets / 8).max(1);
        let sockets = sockets.saturating_sub(2 * self.http_clients).max(2);
        self.strangers = self.strangers.min(sockets / 2);
        self.clients = self.clients.min(sockets - self.strangers);
    }
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            packet: limits::PACKET,
            control_packet: 128 * 1024,
            properties: 16 * 1024,
            client_id: 1024,
            package: limits::PACKAGE,
            live_payload: 1024 * 1024,
            clients: 100_000,
            strangers: 1024,
            connect: Duration::from_secs(10),
            write_stall: Duration::from_secs(30),
            read_stall: Duration::from_secs(30),
            slowest_upload: 8 * 1024,
            slowest_contended_upload: 256 * 1024,
            contended_stall: Duration::from_secs(5),
            inbound_window: 64,
            topic_aliases: 32,
            unreleased: 1024,
            outbound_window: 64,
            queue_messages: 256,
            queue_bytes: 1024 * 1024,
            http_clients: 2048,
            http_head: Duration::from_secs(15),
            http_body: 256 * 1024,
            http_events: 256,
            inbound_bytes: 256 * 1024 * 1024,
            subscriptions: 1024,
            sessions: 100_000,
            session_expiry: Duration::from_secs(90 * 24 * 3600),
            session_messages: 1000,
            session_bytes: 4 * 1024 * 1024,
            retained: 1_000_000,
            disk_reserve: 32 * 1024 * 1024,
            gc_every: DAY,
            gc_keep: 10,
            gc_grace: 7 * DAY,
            mpyblox_patience: Duration::from_secs(120),
            shutdown: Duration::from_secs(10),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_and_strangers_leave_files_for_the_index() {
        let fit = |files| {
            let mut limits = Limits::default();
            limits.fit_into(files);
            (limits.clients, limits.strangers, limits.http_clients)
        };
        assert_eq!(fit(1_000_000), (100_000, 1024, 2048));
        assert_eq!(fit(4096), (4096 - 256 - 960 - 1024, 1024, 480));
        assert_eq!(fit(1024), (288, 288, 96));
        assert_eq!(fit(0), (1, 1, 1));
    }
}
