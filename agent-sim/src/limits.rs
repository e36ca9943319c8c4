//! Every limit of the agent, by name. The wire's own are in [`mpypi_protocol::limits`].

use std::time::Duration;

/// How much of a file is held in memory while it is written, read or hashed, in bytes.
pub const PIECE: usize = 4096;

/// Most members of a wheel.
pub const WHEEL_MEMBERS: usize = 4096;

/// Largest RECORD or METADATA of a wheel, in bytes.
pub const WHEEL_TEXT: u64 = 1024 * 1024;

/// Most bytes a wheel may unpack to: a bomb is refused here, whatever its headers say.
pub const WHEEL_UNPACKED: u64 = 4 * mpypi_protocol::limits::PACKAGE;

/// Largest record, in bytes.
pub const RECORD: u64 = 16 * 1024 * 1024;

/// Room for the records to come, taken before the commit, in bytes: `journal.json` and `seen.json`, each with a
/// reason as long as [`ERROR_TEXT`].
pub const RESERVE: usize = 8192;

/// How often a release may boot without being confirmed, and a committed install may fail to complete,
/// before it is rolled back.
pub const UNCONFIRMED_BOOTS: u32 = 3;

/// How long to wait for any of the packages asked for.
pub const FETCH_STALL: Duration = Duration::from_secs(10);

/// Most chunks of a package that are asked for or held at a time.
pub const CHUNK_WINDOW: u32 = 4;

/// How often a release is tried before the agent gives up until the next list or connection.
pub const ATTEMPTS: u32 = 5;

/// How often a package that arrived damaged is fetched, before the agent gives up until the next list or connection.
pub const FETCHES: u32 = 2;

/// How often the channel's list is asked for although none came: a message may have been lost on the way. A
/// quarter more or less, so that a fleet does not ask at once.
pub const CHECK: Duration = Duration::from_secs(3600);

/// The same where the broker has several addresses, unless told otherwise: in a cluster that loses a node, messages are lost
/// on the way more often.
pub const CHECK_SEVERAL: Duration = Duration::from_secs(300);

/// The first pause before a release is tried again.
pub const RETRY_FIRST: Duration = Duration::from_millis(500);

/// The longest pause before a release is tried again.
pub const RETRY_MOST: Duration = Duration::from_secs(30);

/// The first pause before the broker is tried again, at most: ten thousand devices whose broker restarts come back
/// over all of it.
pub const RECONNECT_FIRST: Duration = Duration::from_secs(1);

/// The longest pause before the broker is tried again.
pub const RECONNECT_MOST: Duration = Duration::from_secs(15);

/// How long a node stays at a broker, one of several, that is behind others, at least. A cluster is given time to bring
/// it what it lacks.
pub const BEHIND_LEAST: Duration = Duration::from_secs(5);

/// And at most: chance says when, so that they do not all come to the others at once.
pub const BEHIND_MOST: Duration = Duration::from_secs(30);

/// How long a new release must run before it is confirmed, unless told otherwise.
pub const CONFIRM_AFTER: Duration = Duration::from_millis(500);

/// The shortest time between two reports of progress within one phase.
pub const PROGRESS: Duration = Duration::from_millis(500);

/// MQTT keep-alive.
pub const KEEP_ALIVE: Duration = Duration::from_secs(30);

/// How long a node that stops waits for the broker to acknowledge its last state. A broker that has ten thousand of them
/// to sync takes seconds.
pub const LAST_STATE: Duration = Duration::from_secs(10);

/// How long a goodbye to the broker may take.
pub const GOODBYE: Duration = Duration::from_secs(2);

/// Most publishes of ours without an acknowledgement.
pub const IN_FLIGHT: u16 = 8;

/// Most requests waiting for the connection. The state machine never has as many: a window of
/// subscriptions, their ends, and a few messages of its own.
pub const REQUESTS: usize = 256;

/// Longest `error` of a state message, in bytes.
pub const ERROR_TEXT: usize = 500;

/// Room on a flash in memory, in bytes, as most boards have.
pub const MEMORY_FLASH: u64 = 4 * 1024 * 1024;

/// How long a device with Mpy-BLOX stays deaf when its connection breaks, until its watchdog starts it again.
pub const WATCHDOG: Duration = Duration::from_secs(10);

/// How long such a device goes on when it has installed something while the user's program runs.
pub const LATER: Duration = Duration::from_secs(3);

/// How far an intruder's package goes on beyond its end, in bytes, at most.
pub const TOO_LONG: usize = 64 * 1024;

/// How long a node waits for the end of a message of which nothing comes any more: its broker is asked for a sign of life,
/// owes it when it is asked again, and is given up.
pub const ENDLESS: Duration = KEEP_ALIVE.saturating_mul(2);

/// How long a simulated device takes to start.
pub const START: Duration = Duration::from_millis(300);

/// How often a fleet counts how its nodes stand.
pub const SAMPLE: Duration = Duration::from_millis(500);

/// How finely a fleet's report counts how long nodes were without a connection.
pub const RECONNECT_BIN: Duration = Duration::from_millis(500);

/// How many such bins there are; what took longer stands together in one more.
pub const RECONNECT_BINS: u64 = 40;

/// Connections made within this time were made at once.
pub const CROWD: Duration = Duration::from_millis(100);

/// Most samples that a fleet's report holds, and its plots show; of a longer run, every nth.
pub const SAMPLES: usize = 600;

/// Most nodes that a report for people names, and most that CI is told of one by one.
pub const NAMED: usize = 100;

/// Most nodes that a pull request is told of: GitHub shows ten annotations of a step.
pub const ANNOTATED: usize = 8;

/// Most nodes of which a fleet tells every step; of a larger one it tells the sums.
pub const TOLD_ONE_BY_ONE: usize = 50;

/// Most nodes of a fleet.
pub const NODES: u32 = 20_000;

/// Most tasks of a device's local interface that are remembered, and of packages that failed there.
pub const TASKS: usize = 64;

/// Most of them that wait or run.
pub const TASKS_WAITING: usize = 32;

/// Largest log of a task, in bytes.
pub const TASK_LOG: u64 = 16 * 1024;

/// How often a package is asked for, with [`FETCH_STALL`] between.
pub const TASK_TRIES: u32 = 3;

/// How many restarts a running task outlives.
pub const TASK_RESUMES: u32 = 3;

/// Most packages that are downloaded and not installed.
pub const SHELF: usize = 16;

/// Room for a firmware image, unless told otherwise, in bytes.
pub const SLOT: u64 = 4 * 1024 * 1024;

/// How long a device shows that it is about to restart with a new firmware.
pub const REBOOT: Duration = Duration::from_millis(600);

/// Largest body of a request to a face, as its length says, in bytes.
pub const CONTENT: u64 = 8 * 1024 * 1024;

/// Largest order to the App Store, in bytes.
pub const ORDER: usize = 64 * 1024;

/// How long to wait for the next bytes of an upload, and for a client to take those of an answer.
pub const UPLOAD_STALL: Duration = Duration::from_secs(10);

/// How often a server may send who fetches a firmware elsewhere.
pub const REDIRECTS: u32 = 10;

/// How much of a firmware is handed on at a time, in bytes.
pub const FETCH_PIECE: usize = 16 * 1024;
