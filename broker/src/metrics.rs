//! What the broker counts, and how it is told to Prometheus and to `$SYS`.
//!
//! Counters are atomics: no lock is taken for a message, and a connection costs nothing here. Everything
//! that can be asked when somebody looks is a [`Gauges`] instead.

use std::{
    fmt::{Display, Write},
    path::Path,
    sync::{
        Arc, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use crate::{
    clock,
    connection::{PLACE, Shared},
    edge::{Edge, relay::Standing, view::Seen},
    fleet::{
        self,
        view::{Tally, View, Word},
    },
    gateway::count::{Counts, Face},
    index::{IndexError, Totals},
    mpyblox,
    packet::Reason,
};

/// Counts for as long as the broker runs.
#[derive(Debug)]
pub struct Metrics {
    /// Connections accepted.
    pub connections: Counter,
    /// Connections closed at once, because there were too many.
    pub turned_away: Counter,
    /// Connections that never sent a CONNECT, or only bytes that are none.
    pub strangers: Counter,
    /// Clients let in.
    pub connects: Counter,
    /// CONNECTs refused.
    pub connects_refused: ByReason,
    /// Bytes read from clients.
    pub bytes_received: Counter,
    /// Bytes sent to clients.
    pub bytes_sent: Counter,
    /// Messages that clients published, refused ones included.
    pub messages_received: Counter,
    /// Messages sent to clients.
    pub messages_sent: Counter,
    /// Messages let in.
    pub publishes: Counter,
    /// Messages refused.
    pub publishes_refused: ByReason,
    /// Sessions that the broker ended.
    pub ended: ByReason,
    /// Connections closed because their client took no bytes.
    pub stuck: Counter,
    /// Times that a client's queue was full and it read again from the index.
    pub lagging: Counter,
    /// Lists that Mpy-BLOX nodes got otherwise than they were published.
    pub mpyblox_adapted: Counter,
    /// Answers held back from devices that ask without a pause.
    pub things_held: Counter,
    /// Lists that were sent once to a Mpy-BLOX node.
    pub mpyblox_errands: Counter,
    /// Commits of the index, by how many messages each held.
    pub commit_messages: Histogram<10>,
    /// Commits of the index, by the seconds each took.
    pub commit_seconds: Histogram<10>,
    /// Commits that failed.
    pub commits_failed: Counter,
    /// Sessions that outlive their connections.
    pub sessions: AtomicU64,
    /// Those of them that have none now.
    pub sessions_away: AtomicU64,
    /// Whether the index takes no messages now, because the disk is full.
    pub is_full: AtomicBool,
    /// What is asked over HTTP.
    pub http: Arc<Counts>,
    started_ms: u64,
}

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

/// One counter for each reason code.
#[derive(Debug)]
pub struct ByReason([AtomicU64; 256]);

/// How often a value was at most each of some bounds.
#[derive(Debug)]
pub struct Histogram<const N: usize> {
    bounds: [f64; N],
    /// One for each bound, and one for what is beyond the last.
    counts: [AtomicU64; N],
    beyond: AtomicU64,
    /// In millionths.
    sum: AtomicU64,
}

impl Counter {
    /// Counts one more.
    pub fn one(&self) {
        self.add(1);
    }

    /// Counts so many more.
    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    /// The count.
    #[must_use]
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl ByReason {
    /// Counts one more for `reason`.
    pub fn one(&self, reason: Reason) {
        self.0[usize::from(reason as u8)].fetch_add(1, Ordering::Relaxed);
    }

    /// Reason codes that were counted, and how often.
    fn values(&self) -> impl Iterator<Item = (usize, u64)> {
        self.0.iter().map(|count| count.load(Ordering::Relaxed)).enumerate().filter(|(_, count)| *count > 0)
    }
}

impl Default for ByReason {
    fn default() -> Self {
        ByReason(std::array::from_fn(|_| AtomicU64::new(0)))
    }
}

impl<const N: usize> Histogram<N> {
    fn new(bounds: [f64; N]) -> Self {
        Histogram {
            bounds,
            counts: std::array::from_fn(|_| AtomicU64::new(0)),
            beyond: AtomicU64::new(0),
            sum: AtomicU64::new(0),
        }
    }

    /// Takes a value.
    pub fn observe(&self, value: f64) {
        let count = self.bounds.iter().position(|bound| value <= *bound).map(|at| &self.counts[at]);
        count.unwrap_or(&self.beyond).fetch_add(1, Ordering::Relaxed);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "it is rounded, and positive"
        )]
        self.sum.fetch_add((value * 1e6) as u64, Ordering::Relaxed);
    }
}

impl Default for Metrics {
    fn default() -> Self {
        let messages = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0];
        let seconds = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0];
        Metrics {
            connections: Counter::default(),
            turned_away: Counter::default(),
            strangers: Counter::default(),
            connects: Counter::default(),
            connects_refused: ByReason::default(),
            bytes_received: Counter::default(),
            bytes_sent: Counter::default(),
            messages_received: Counter::default(),
            messages_sent: Counter::default(),
            publishes: Counter::default(),
            publishes_refused: ByReason::default(),
            ended: ByReason::default(),
            stuck: Counter::default(),
            lagging: Counter::default(),
            mpyblox_adapted: Counter::default(),
            things_held: Counter::default(),
            mpyblox_errands: Counter::default(),
            commit_messages: Histogram::new(messages),
            commit_seconds: Histogram::new(seconds),
            commits_failed: Counter::default(),
            sessions: AtomicU64::new(0),
            sessions_away: AtomicU64::new(0),
            is_full: AtomicBool::new(false),
            http: Arc::default(),
            started_ms: clock::now().unix_ms,
        }
    }
}

/// How things stand at the moment somebody looks.
#[derive(Debug, Clone, Copy)]
pub struct Gauges {
    /// How long the broker has been running.
    pub uptime: Duration,
    /// Connections, those of strangers included.
    pub connections: usize,
    /// Clients connected.
    pub clients: usize,
    /// HTTP connections.
    pub http: usize,
    /// HTTP clients that listen for events.
    pub events: usize,
    /// Subscriptions of all clients.
    pub subscriptions: usize,
    /// Bytes of the index's database.
    pub file: u64,
    /// Messages that wait for the index's writer.
    pub waiting_writer: usize,
    /// Messages on the bus.
    pub waiting_bus: usize,
    /// Bytes reserved for large packets being received.
    pub receiving: usize,
    /// What the index holds.
    pub index: Totals,
    /// Bytes free on the index's disk, and its size; `None` if the system does not tell.
    pub disk: Option<(u64, u64)>,
    /// Whether the index takes no messages now.
    pub is_full: bool,
    /// Logins refused.
    pub logins_refused: u64,
    /// Mpy-BLOX nodes that are not simply served, by [`mpyblox::WORDS`].
    pub mpyblox: [u64; mpyblox::WORDS.len()],
}

impl Gauges {
    /// Looks.
    ///
    /// # Errors
    /// The index cannot be read.
    pub fn look(shared: &Shared) -> Result<Gauges, IndexError> {
        let (limits, metrics) = (&shared.limits, &shared.metrics);
        let places = limits.inbound_bytes / PLACE;
        let sockets = limits.clients + limits.strangers;
        let subscriptions = shared.subscriptions.read().unwrap_or_else(PoisonError::into_inner);
        let subscribed = subscriptions.of_clients();
        drop(subscriptions);
        let disk = disk(shared.index.folder());
        Ok(Gauges {
            uptime: Duration::from_millis(clock::now().unix_ms.saturating_sub(metrics.started_ms)),
            connections: sockets.saturating_sub(shared.sockets.available_permits()),
            clients: limits.clients.saturating_sub(shared.clients.available_permits()),
            events: limits.http_events.saturating_sub(shared.events.available_permits()),
            file: shared.index.file_size(),
            http: limits.http_clients.saturating_sub(shared.http.available_permits()),
            subscriptions: subscribed,
            waiting_writer: shared.ops.max_capacity() - shared.ops.capacity(),
            waiting_bus: shared.tickets.waiting(),
            receiving: places.saturating_sub(shared.places.available_permits()) * PLACE,
            index: shared.index.totals()?,
            disk,
            is_full: metrics.is_full.load(Ordering::Relaxed)
                || disk.is_some_and(|(free, _)| free < limits.disk_reserve),
            logins_refused: shared.gate.refused(),
            mpyblox: shared.mpyblox.words(),
        })
    }
}

/// Bytes free for us on the disk of `folder`, and its size.
#[must_use]
pub fn disk(folder: &Path) -> Option<(u64, u64)> {
    let found = rustix::fs::statvfs(folder).ok()?;
    Some((found.f_bavail.saturating_mul(found.f_frsize), found.f_blocks.saturating_mul(found.f_frsize)))
}

/// How it goes with an upstream.
#[derive(Debug, Clone)]
pub struct Upstream {
    seen: Seen,
    /// Bytes that came from there for channels.
    received: u64,
}

impl Upstream {
    /// Looks.
    #[must_use]
    pub fn look(edge: &Edge) -> Upstream {
        Upstream { seen: edge.view().look(), received: edge.received() }
    }
}

/// Everything, in Prometheus's text format 0.0.4.
#[must_use]
pub fn prometheus(metrics: &Metrics, gauges: &Gauges, view: &View, upstream: Option<&Upstream>) -> String {
    let mut out = Text::default();
    out.head("build_info", "gauge", "The broker's version");
    out.line("build_info", &[("version", env!("CARGO_PKG_VERSION"))], 1);
    let gauge = |out: &mut Text, name: &str, help: &str, value: u64| {
        out.head(name, "gauge", help);
        out.line(name, &[], value);
    };
    let counter = |out: &mut Text, name: &str, help: &str, value: u64| {
        out.head(name, "counter", help);
        out.line(name, &[], value);
    };
    gauge(&mut out, "uptime_seconds", "How long the broker has been running", gauges.uptime.as_secs());
    gauge(&mut out, "connections", "Connections, not only clients'", gauges.connections as u64);
    gauge(&mut out, "clients", "Clients connected", gauges.clients as u64);
    gauge(&mut out, "http_connections", "HTTP connections", gauges.http as u64);
    let sessions = metrics.sessions.load(Ordering::Relaxed);
    gauge(&mut out, "sessions", "Sessions that outlive their connections", sessions);
    let away = metrics.sessions_away.load(Ordering::Relaxed);
    gauge(&mut out, "sessions_away", "Sessions without a connection", away);
    gauge(&mut out, "subscriptions", "Subscriptions of all clients", gauges.subscriptions as u64);
    gauge(&mut out, "writer_queue", "Messages that wait for the index", gauges.waiting_writer as u64);
    gauge(&mut out, "bus_queue", "Messages on the bus", gauges.waiting_bus as u64);
    gauge(&mut out, "event_streams", "HTTP clients that listen for events", gauges.events as u64);
    gauge(&mut out, "receiving_bytes", "Room taken by large packets under way", gauges.receiving as u64);
    gauge(&mut out, "retained_messages", "Retained messages", gauges.index.messages);
    gauge(&mut out, "retained_bytes", "Bytes of all retained payloads", gauges.index.bytes);
    gauge(&mut out, "blobs", "Payloads kept as files", gauges.index.blobs);
    gauge(
        &mut out,
        "index_file_bytes",
        "Size of the index's database, without payloads kept as files",
        gauges.file,
    );
    if let Some((free, size)) = gauges.disk {
        gauge(&mut out, "disk_free_bytes", "Free on the index's disk", free);
        gauge(&mut out, "disk_size_bytes", "Size of the index's disk", size);
    }
    gauge(&mut out, "disk_full", "1 while messages are refused for want of space", gauges.is_full.into());
    let counts: [(&str, &str, &Counter); 15] = [
        ("connections_total", "Connections accepted", &metrics.connections),
        ("connections_turned_away_total", "Connections closed at once: too many", &metrics.turned_away),
        ("connections_without_connect_total", "Connections without a CONNECT", &metrics.strangers),
        ("connects_total", "Clients let in", &metrics.connects),
        ("received_bytes_total", "Bytes from clients", &metrics.bytes_received),
        ("sent_bytes_total", "Bytes to clients", &metrics.bytes_sent),
        ("received_messages_total", "Messages that clients published", &metrics.messages_received),
        ("sent_messages_total", "Messages sent to clients", &metrics.messages_sent),
        ("publishes_total", "Messages let in", &metrics.publishes),
        ("stuck_total", "Connections closed because nobody took their bytes", &metrics.stuck),
        ("lagging_total", "Times a client had to read again from the index", &metrics.lagging),
        ("mpyblox_lists_adapted_total", "Lists changed for a Mpy-BLOX node", &metrics.mpyblox_adapted),
        (
            "things_held_total",
            "Answers held back from devices that ask without a pause",
            &metrics.things_held,
        ),
        ("mpyblox_errands_total", "Lists sent once to a Mpy-BLOX node", &metrics.mpyblox_errands),
        ("commits_failed_total", "Commits of the index that failed", &metrics.commits_failed),
    ];
    for (name, help, count) in counts {
        counter(&mut out, name, help, count.value());
    }
    out.head("mpyblox_nodes", "gauge", "Mpy-BLOX nodes that are not simply served their channel's list");
    for (word, nodes) in mpyblox::WORDS.iter().zip(gauges.mpyblox) {
        out.line("mpyblox_nodes", &[("state", word)], nodes);
    }
    counter(&mut out, "logins_refused_total", "Logins refused", gauges.logins_refused);
    let by_reason: [(&str, &str, &ByReason); 3] = [
        ("connects_refused_total", "CONNECTs refused, by MQTT 5 reason code", &metrics.connects_refused),
        ("publishes_refused_total", "Messages refused, by MQTT 5 reason code", &metrics.publishes_refused),
        ("sessions_ended_total", "Sessions the broker ended, by MQTT 5 reason code", &metrics.ended),
    ];
    for (name, help, counts) in by_reason {
        out.head(name, "counter", help);
        for (reason, count) in counts.values() {
            out.line(name, &[("reason", &format!("0x{reason:02x}"))], count);
        }
    }
    out.head("http_requests_total", "counter", "HTTP requests answered, by face and status");
    for face in Face::ALL {
        for (code, count) in metrics.http.of(face).codes() {
            out.line("http_requests_total", &[("face", face.name()), ("code", &code.to_string())], count);
        }
    }
    out.head("http_sent_bytes_total", "counter", "Bytes of HTTP bodies sent, by face");
    for face in Face::ALL {
        out.line("http_sent_bytes_total", &[("face", face.name())], metrics.http.of(face).bytes.value());
    }
    fleet_metrics(&mut out, view);
    if let Some(Upstream { seen, received }) = upstream {
        let (packages, bytes) = seen.missing();
        let Standing { nodes, waiting, dropped } = seen.relay;
        gauge(
            &mut out,
            "upstream_connected",
            "1 while channels come from upstream",
            seen.is_connected.into(),
        );
        gauge(&mut out, "upstream_relaying", "1 while nodes' states go upstream", seen.is_relaying.into());
        gauge(&mut out, "upstream_loop", "1 if this broker is its own upstream", seen.is_loop.into());
        gauge(&mut out, "upstream_missing_packages", "Packages that lists wait for", packages);
        gauge(&mut out, "upstream_missing_bytes", "Bytes of them, as far as lists tell", bytes);
        gauge(&mut out, "upstream_held_lists", "Lists that are held back", seen.held());
        gauge(&mut out, "upstream_nodes", "Nodes that are spoken for upstream", nodes as u64);
        gauge(&mut out, "upstream_waiting", "Messages that wait to go upstream", waiting as u64);
        counter(&mut out, "upstream_packages_total", "Packages that came from upstream", seen.fetched);
        counter(&mut out, "upstream_received_bytes_total", "Bytes that came for channels", *received);
        counter(&mut out, "upstream_dropped_total", "Nodes' lines that did not go upstream", dropped);
    }
    out.histogram("commit_messages", "Messages in a commit", &metrics.commit_messages);
    out.histogram("commit_seconds", "How long a commit took", &metrics.commit_seconds);
    out.0
}

/// How many nodes stand where. Of releases, and of reasons to fail, so many are told apart as [`limits`](fleet::limits) say.
fn fleet_metrics(out: &mut Text, view: &View) {
    out.head("nodes", "gauge", "Nodes, by the release they are on or busy with, and the phase of that");
    let (releases, other) = view.top_releases();
    let mut nodes = |labels: [(&str, &str); 3], tally: &Tally| {
        for (word, count) in Word::ALL.iter().zip(tally).filter(|(_, count)| **count > 0) {
            let [channel, sequence, version] = labels;
            out.line("nodes", &[channel, sequence, version, ("phase", word.as_str())], count);
        }
    };
    for (release, tally) in &releases {
        let channel = release.channel.as_ref().map_or("", |channel| channel.as_str());
        let sequence = release.sequence.map(|sequence| sequence.to_string()).unwrap_or_default();
        let version = release.version.as_deref().unwrap_or_default();
        nodes([("channel", channel), ("sequence", &sequence), ("version", version)], tally);
    }
    let rest = fleet::limits::OTHER;
    nodes([("channel", rest), ("sequence", rest), ("version", rest)], &other);
    for (name, help, value) in [
        ("nodes_online", "Nodes that are connected", view.online()),
        ("nodes_behind", "Nodes whose channel has a newer release than theirs", view.behind()),
    ] {
        out.head(name, "gauge", help);
        out.line(name, &[], value);
    }
    for (name, kind, help, counts) in [
        ("nodes_failed", "gauge", "Nodes that stand failed or rolled back, by reason", view.failing()),
        ("node_failures_total", "counter", "Updates that came to nothing, by reason", view.failures()),
    ] {
        out.head(name, kind, help);
        for (reason, count) in counts {
            out.line(name, &[("reason", reason)], count);
        }
    }
}

#[derive(Default)]
struct Text(String);

impl Text {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        writeln!(self.0, "# HELP mpypi_{name} {help}.\n# TYPE mpypi_{name} {kind}").ok();
    }

    fn line(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        // What devices and publishers call things may hold anything.
        let escape = |value: &str| value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        let labels: Vec<_> =
            labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escape(value))).collect();
        let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
        writeln!(self.0, "mpypi_{name}{labels} {value}").ok();
    }

    fn histogram<const N: usize>(&mut self, name: &str, help: &str, histogram: &Histogram<N>) {
        self.head(name, "histogram", help);
        let bucket = format!("{name}_bucket");
        let mut below = 0;
        for (bound, count) in histogram.bounds.iter().zip(&histogram.counts) {
            below += count.load(Ordering::Relaxed);
            self.line(&bucket, &[("le", &bound.to_string())], below);
        }
        below += histogram.beyond.load(Ordering::Relaxed);
        self.line(&bucket, &[("le", "+Inf")], below);
        #[expect(clippy::cast_precision_loss, reason = "a sum for people")]
        self.line(&format!("{name}_sum"), &[], histogram.sum.load(Ordering::Relaxed) as f64 / 1e6);
        self.line(&format!("{name}_count"), &[], below);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_counts_each_value_under_every_bound_that_it_does_not_exceed() {
        let histogram = Histogram::new([1.0, 2.0]);
        [0.5, 1.0, 1.5, 3.0].into_iter().for_each(|value| histogram.observe(value));
        let mut out = Text::default();
        out.histogram("h", "Help", &histogram);
        let expected = "# HELP mpypi_h Help.\n# TYPE mpypi_h histogram\nmpypi_h_bucket{le=\"1\"} 2\n\
                        mpypi_h_bucket{le=\"2\"} 3\nmpypi_h_bucket{le=\"+Inf\"} 4\nmpypi_h_sum 6\nmpypi_h_count 4\n";
        assert_eq!(out.0, expected);
    }

    #[test]
    fn reasons_are_counted_apart() {
        let counts = ByReason::default();
        counts.one(Reason::QuotaExceeded);
        counts.one(Reason::QuotaExceeded);
        counts.one(Reason::NotAuthorized);
        assert_eq!(counts.values().collect::<Vec<_>>(), [(0x87, 1), (0x97, 2)]);
    }
}
