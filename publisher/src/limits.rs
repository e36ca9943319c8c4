//! Every limit of the publisher, by name.

use std::time::Duration;

/// Largest `.whl`, `pyproject.toml`, `channel.toml` or ignore file that is read, in bytes.
pub const INPUT: u64 = mpypi_protocol::limits::PACKAGE;

/// Most files in one wheel.
pub const WHEEL_FILES: usize = 4096;

/// Most bytes in all files of one wheel together, unpacked.
pub const WHEEL_UNPACKED: u64 = 32 * 1024 * 1024;

/// How far back a compressed file of a wheel may refer, in bytes: what a device of a few KiB can hold.
pub const WINDOW: usize = 4096;

/// Most files that a channel folder may hold, those that end up inside wheels included.
pub const FILES: usize = 2 * mpypi_protocol::limits::LIST_ENTRIES;

/// Bytes of each chunk of a package that is larger than what a broker takes, unless told otherwise.
pub const CHUNK: u64 = 64 * 1024;

/// Most packages on their way without an acknowledgement. Mosquitto's receive maximum is 20.
pub const IN_FLIGHT: usize = 16;

/// Most bytes of packages on their way without an acknowledgement; one package may be larger.
pub const IN_FLIGHT_BYTES: u64 = 2 * 1024 * 1024;

/// Most SUBSCRIBE packets on their way without an acknowledgement: each may be answered by eight packages.
pub const ASKS_IN_FLIGHT: usize = 4;

/// Most UNSUBSCRIBE packets on their way without an acknowledgement.
pub const UNASKS_IN_FLIGHT: usize = 64;

/// Most packages asked for, and subscribed to, at a time.
pub const ASK_BATCH: usize = 256;

/// A broker that said nothing for so long after its SUBACK retains nothing there.
pub const QUIET: Duration = Duration::from_millis(500);

/// A broker that owes an answer and says nothing for so long is given up. Long enough for the largest
/// package on a slow line, on which the broker is silent until it has all of it.
pub const SILENCE: Duration = Duration::from_secs(120);

/// Connecting, the broker's greeting included.
pub const CONNECT: Duration = Duration::from_secs(5);

/// Ping after so much time without another packet.
pub const KEEP_ALIVE: Duration = Duration::from_secs(60);

/// The last DISCONNECT may take so long.
pub const GOODBYE: Duration = Duration::from_secs(1);

/// Lost connections in a row, nothing acknowledged in between, before a publish gives up.
pub const ATTEMPTS: u32 = 6;

/// First pause after a lost connection; it doubles each time, and chance takes up to half of it away.
pub const BACKOFF: Duration = Duration::from_millis(500);

/// Longest pause after a lost connection, before chance shortens it.
pub const BACKOFF_MAX: Duration = Duration::from_secs(15);

/// A throw-away broker says so soon where it listens, or is given up.
pub const BROKER_START: Duration = Duration::from_secs(30);

/// How often a rehearsal looks whether all devices have what they start with.
pub const REHEARSAL_LOOK: Duration = Duration::from_millis(500);

/// A step that does not get to where it should is given up after so many times its wait, if nobody says otherwise.
pub const ROLLOUT_PATIENCE: u64 = 3;

/// How often a rollout is looked at, and at most how long messages about it are collected before.
pub const ROLLOUT_LOOK: Duration = Duration::from_millis(500);

/// When nothing arrived for so long, what did is looked at.
pub const ROLLOUT_PAUSE: Duration = Duration::from_millis(30);

/// How often everything about a rollout is asked for again: brokers may drop messages to readers that are slow.
pub const ROLLOUT_REFRESH: Duration = Duration::from_secs(60);

/// Who claimed a rollout acts when nobody else has for so long: longer than a claim is on its way.
pub const LEASE_SETTLES: Duration = Duration::from_secs(1);

/// The keep-alive of who steers a rollout: when it is gone, another may take over after one and a half times this.
pub const LEASE_KEEP_ALIVE: Duration = Duration::from_secs(10);

/// Connections that may be lost in a row while a rollout is steered: it goes on for days, and a broker may be away for long.
pub const STEER_ATTEMPTS: u32 = 40;

/// Who steers a rollout answers an order within this time.
pub const ORDER_ANSWER: Duration = Duration::from_secs(10);

/// `watch` waits until nothing changed for so long: editors write in several steps.
pub const DEBOUNCE: Duration = Duration::from_millis(200);

/// A digest is remembered only for a file that was left alone for so long before it was read: within the
/// file system's tick, two writes of equal size look like one.
pub const SETTLED: Duration = Duration::from_secs(2);

/// `watch` looks so often whether its folder is still the same one.
pub const LOOK: Duration = Duration::from_secs(2);

/// Most mpy-cross programs that run at a time.
pub const COMPILERS: usize = 8;

/// mpy-cross may be silent for so long about one file.
pub const COMPILE: Duration = Duration::from_secs(60);

/// Most bytes that are kept of what mpy-cross says on one of its outputs.
pub const COMPILER_OUTPUT: u64 = 64 * 1024;

/// How long a device that is updated over HTTP may take for one answer.
pub const DEVICE: Duration = Duration::from_secs(10);

/// How often it is asked how it stands.
pub const DEVICE_POLL: Duration = Duration::from_secs(1);

/// Largest answer of it, in bytes.
pub const DEVICE_ANSWER: u64 = 256 * 1024;

/// Most devices that are updated over HTTP at a time, whatever is asked for.
pub const PUSH_PARALLEL: usize = 64;

/// Most devices that one `push` knows.
pub const PUSH_DEVICES: usize = 10_000;

/// Largest file of devices, in bytes.
pub const PUSH_FILE: u64 = 4 * 1024 * 1024;

/// How many devices are asked at a time what they are.
pub const PUSH_GREETINGS: usize = 16;

/// Most words about devices that wait to be published or shown.
pub const PUSH_WORDS: usize = 256;

/// `push --follow` sees to its devices at least so often: some may have been away.
pub const PUSH_AGAIN: Duration = Duration::from_secs(300);

/// Most bytes that a git server may send for one publish.
pub const GIT_DOWNLOAD: u64 = 1024 * 1024 * 1024;

/// How often it is told how many bytes have come from a git server, in bytes.
pub const GIT_TOLD: u64 = 64 * 1024;

/// Bytes of an answer of a git server that are read at a time.
pub const GIT_PIECE: usize = 64 * 1024;

/// Largest request to a git server, in bytes: what is wanted, and what is there already.
pub const GIT_REQUEST: usize = 8 * 1024 * 1024;

/// Most redirects on the way to a git server.
pub const GIT_REDIRECTS: u32 = 10;

/// Most packs of one repository that are kept: then it is fetched anew.
pub const GIT_PACKS: usize = 50;

/// Most bytes that are kept of one repository: likewise.
pub const GIT_CACHE: u64 = 2 * GIT_DOWNLOAD;

/// Most files in a folder that is published out of git, those that are left out later included.
pub const GIT_FILES: usize = 4 * FILES;

/// Most bytes in them.
pub const GIT_TREE: u64 = 512 * 1024 * 1024;

/// Most folders in each other.
pub const GIT_DEPTH: usize = 64;

/// How many names are told to who names no branch or tag that is there.
pub const GIT_NEAR: usize = 5;

/// Most bytes of a netrc file that are read.
pub const NETRC: u64 = 64 * 1024;

/// A sign command may take so long: somebody may have to touch a token.
pub const SIGN: Duration = Duration::from_secs(60);

/// Most bytes that a sign command may answer with.
pub const SIGNATURE: u64 = 4096;

/// Lists of a channel that stay in its history when they are replaced; older ones are cleared.
pub const HISTORY: u64 = 20;

/// How long a root, or what it delegates, is believed unless told otherwise, in days.
pub const ROOT_DAYS: u32 = 730;

/// Most looks at what each of several brokers has, until they agree.
pub const AGREE_LOOKS: u32 = 24;

/// How often what one of them lacks is published again.
pub const AGREE_REPAIRS: u32 = 6;

/// First pause between two looks; it doubles.
pub const AGREE_PAUSE: Duration = Duration::from_millis(250);

/// Longest pause between two looks.
pub const AGREE_PAUSE_MOST: Duration = Duration::from_secs(5);

/// Reading or writing through one of several brokers, in all, at one look: one that takes longer counts as unreachable.
pub const AGREE_LOOK: Duration = Duration::from_secs(120);

/// One probe of `doctor` may take so long, connecting included; one of a large message [`SILENCE`] more.
pub const DOCTOR_PROBE: Duration = Duration::from_secs(20);

/// How often a broker is asked for what it acknowledged before it counts as dropped, [`QUIET`] each time.
pub const DOCTOR_READS: u32 = 3;

/// Largest retained payload that `doctor` tries unless told otherwise, in bytes.
pub const DOCTOR_LARGEST: u64 = mpypi_protocol::limits::PACKAGE;

/// Largest that it can be told to try, in bytes: what fits into a packet beside the topic.
pub const DOCTOR_LARGEST_MOST: u64 =
    (mpypi_protocol::limits::PACKET - mpypi_protocol::limits::TOPIC - 1024) as u64;

/// Smallest that it can be told to stop at, in bytes.
pub const DOCTOR_SMALLEST: u64 = 1024;

/// Where the search for the largest payload begins, in bytes.
pub const DOCTOR_FIRST: u64 = 64 * 1024;

/// Largest retained payload below which a broker is not fit, in bytes: lists and most files still go into it.
pub const DOCTOR_LEAST: u64 = 64 * 1024;

/// The largest payload is found to one part in so many.
pub const DOCTOR_RESOLUTION: u64 = 16;

/// Most sizes that are tried.
pub const DOCTOR_SIZES: u32 = 16;

/// Who listens is told of a message within this time, or not at all.
pub const DOCTOR_LIVE: Duration = Duration::from_secs(5);

/// Messages that are asked for at once by a wildcard.
pub const DOCTOR_WILD: usize = 24;

/// A message that is to be there while `doctor` looks is kept so long, in seconds.
pub const DOCTOR_LONG: u32 = 600;

/// One that is to be gone by then, likewise.
pub const DOCTOR_SHORT: u32 = 1;

/// When both are looked at, after they were published: brokers count in whole seconds.
pub const DOCTOR_AGE: Duration = Duration::from_millis(2200);

/// How long brokers may take to show what was published at another, unless told otherwise.
pub const DOCTOR_AGREE: Duration = Duration::from_secs(10);

/// A clock may be off by so many seconds before `doctor` says so.
pub const DOCTOR_CLOCK: i64 = 60;

/// Clearing what the probes left, at one broker.
pub const DOCTOR_CLEAN: Duration = Duration::from_secs(60);
