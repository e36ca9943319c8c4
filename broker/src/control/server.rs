//! The answering side.

use std::{
    fs, io,
    os::{fd::AsRawFd, unix::fs::PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use mpypi_protocol::limits::{PACKAGE, PACKET};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{
        UnixListener, UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
    task::spawn_blocking,
    time::timeout,
};
use tokio_util::task::TaskTracker;

use super::{Answer, Done, Engine, Put, Request, SOCKET};
use crate::{
    clock,
    door::{admit, is_heavy},
    index::{
        IndexError,
        check::Depth,
        collect::{REMEMBERED, Rules},
        writer::{Collect, Op, Reply, Settled, Submission},
    },
    limits::Limits,
    listen::ACCEPT_PAUSE,
    mailbox::Mailbox,
    message::chain,
    packet::{Publish, Qos},
    pulse::BROKER,
};

/// Requests served at once; more wait to be accepted.
const REQUESTS: usize = 8;
/// Longest line, in bytes.
const LINE: u64 = 256 * 1024;
/// For a request to arrive, and for a message that is being put to go on.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long the asker may take none of what waits for it.
const STALL: Duration = Duration::from_secs(60);
/// Lines that wait to be sent.
const LINES: usize = 64;
/// Messages put that wait for the index at once.
const WINDOW: usize = 32;
/// Packages removed in one commit: publishers wait for no more than that.
const COLLECTED_AT_ONCE: usize = 256;
/// Messages between two reports on a check.
const REPORT: u64 = 256;

/// The socket of a running broker. Its name goes when the broker stops.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    path: PathBuf,
}

impl Socket {
    /// Binds the socket in `data`. Whoever holds the index may take the place of one that is left over.
    ///
    /// # Errors
    /// The socket cannot be bound.
    pub fn bind(data: &Path) -> io::Result<Socket> {
        // Bound where nobody else looks, and moved when its mode is right.
        let beside = data.join("tmp").join("control");
        fs::create_dir_all(&beside)?;
        fs::set_permissions(&beside, fs::Permissions::from_mode(0o700))?;
        let listener = with_short_path(&beside, |path| UnixListener::bind(path))?;
        fs::set_permissions(beside.join(SOCKET), fs::Permissions::from_mode(0o600))?;
        let path = data.join(SOCKET);
        fs::rename(beside.join(SOCKET), &path)?;
        Ok(Socket { listener, path })
    }

    /// Answers until the broker stops.
    pub async fn serve(self, engine: Engine, tasks: TaskTracker) {
        let places = Arc::new(Semaphore::new(REQUESTS));
        loop {
            let accepted = async {
                let place = places.clone().acquire_owned().await;
                (self.listener.accept().await, place)
            };
            let (accepted, place) = tokio::select! {
                accepted = accepted => accepted,
                () = engine.shutdown.cancelled() => return,
            };
            match accepted {
                Ok((stream, _)) => {
                    let engine = engine.clone();
                    tasks.spawn(async move {
                        serve(stream, &engine).await;
                        drop(place);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a command");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        fs::remove_file(&self.path).ok();
    }
}

/// Hands `with` a path of the socket in `folder` that fits into a socket's address.
pub(super) fn with_short_path<T>(folder: &Path, with: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
    /// Bytes in a socket's address, on any system of ours.
    const LONGEST: usize = 100;
    let path = folder.join(SOCKET);
    if path.as_os_str().len() <= LONGEST {
        return with(&path);
    }
    let open = fs::File::open(folder)?;
    with(&PathBuf::from(format!("/proc/self/fd/{}", open.as_raw_fd())).join(SOCKET))
}

/// Answers one request, until it is done, the asker has gone or the broker stops.
pub async fn serve(stream: UnixStream, engine: &Engine) {
    let (reader, writer) = stream.into_split();
    let (lines, waiting) = mpsc::channel(LINES);
    let answers = Answers(lines);
    let work = async {
        if let Err(error) = answer(BufReader::new(reader), engine, &answers).await {
            answers.say(Answer::Failed { error }).await;
        }
        drop(answers);
    };
    tokio::select! {
        ((), ()) = async { tokio::join!(work, send(writer, waiting)) } => {}
        () = engine.shutdown.cancelled() => {}
    }
}

/// Where answers go. Clones share it.
#[derive(Clone)]
struct Answers(mpsc::Sender<Answer>);

impl Answers {
    /// Says `false` if the asker has gone.
    async fn say(&self, answer: Answer) -> bool {
        self.0.send(answer).await.is_ok()
    }

    /// The same on a thread that may wait.
    fn say_blocking(&self, answer: Answer) -> bool {
        self.0.blocking_send(answer).is_ok()
    }
}

async fn send(mut writer: OwnedWriteHalf, mut waiting: mpsc::Receiver<Answer>) {
    let mut batch = Vec::with_capacity(LINES);
    while waiting.recv_many(&mut batch, LINES).await > 0 {
        let mut text = Vec::new();
        for answer in batch.drain(..) {
            if serde_json::to_writer(&mut text, &answer).is_err() {
                return;
            }
            text.push(b'\n');
        }
        match timeout(STALL, writer.write_all(&text)).await {
            Ok(Ok(())) => {}
            // Dropping `waiting` ends the work.
            _ => return,
        }
    }
}

async fn answer(
    mut reader: BufReader<OwnedReadHalf>,
    engine: &Engine,
    answers: &Answers,
) -> Result<(), String> {
    let request = match timeout(PATIENCE, line(&mut reader)).await {
        Ok(Ok(Some(line))) => line,
        Ok(Ok(None)) => return Ok(()),
        Ok(Err(error)) => return Err(error),
        Err(_) => return Err("no request came".to_owned()),
    };
    match serde_json::from_str(&request).map_err(|error| format!("not a request: {error}"))? {
        Request::Snapshot { payloads } => {
            let pin = engine.index.pin();
            let (index, to) = (engine.index.clone(), answers.clone());
            let done = blocking(move || {
                let mut done = Done::default();
                index.snapshot(payloads, clock::now().unix_ms, |kept| {
                    done.messages += 1;
                    done.bytes += kept.size;
                    to.say_blocking(Answer::Kept(kept))
                })?;
                Ok(done)
            })
            .await?;
            answers.say(Answer::Done(done)).await;
            // Blobs are needed until the asker has gone.
            let _asker = reader.read(&mut [0]).await;
            drop(pin);
            Ok(())
        }
        Request::Put => put(reader, engine, answers).await,
        Request::Gc { dry_run, keep, grace } => {
            let rules = Asked { dry_run, keep, grace: grace.map(Duration::from_secs) };
            let done = collect(engine, rules, |garbage| {
                let answers = answers.clone();
                async move { answers.say(Answer::Garbage(garbage)).await }
            })
            .await?;
            answers.say(Answer::Done(done)).await;
            Ok(())
        }
        Request::Check { deep } => {
            let (index, to) = (engine.index.clone(), answers.clone());
            let depth = if deep { Depth::Digests } else { Depth::Sizes };
            let checked = blocking(move || {
                index.check(depth, |problem, checked| match problem {
                    Some(problem) => to.say_blocking(Answer::Problem(problem)),
                    None if checked.messages.is_multiple_of(REPORT) => {
                        to.say_blocking(Answer::Checked(checked))
                    }
                    None => !to.0.is_closed(),
                })
            })
            .await?;
            answers.say(Answer::Checked(checked)).await;
            answers.say(Answer::Done(Done { messages: checked.messages, bytes: checked.bytes })).await;
            Ok(())
        }
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, IndexError> + Send + 'static,
) -> Result<T, String> {
    match spawn_blocking(work).await {
        Ok(done) => done.map_err(|error| chain(&error)),
        Err(error) => Err(error.to_string()),
    }
}

/// Takes messages and has the writer judge them, as if a client had published them.
async fn put(mut reader: BufReader<OwnedReadHalf>, engine: &Engine, answers: &Answers) -> Result<(), String> {
    let window = Arc::new(Semaphore::new(WINDOW));
    let mut done = Done::default();
    loop {
        let Some(line) = timeout(PATIENCE, line(&mut reader)).await.map_err(|_| "nothing more came")?? else {
            break;
        };
        let put: Put = serde_json::from_str(&line).map_err(|error| format!("not a message: {error}"))?;
        if put.size > PACKET as u64 {
            return Err(format!("`{}` has {} bytes, more than any packet", put.topic, put.size));
        }
        let mut payload = vec![0; usize::try_from(put.size).unwrap_or_default()];
        match timeout(PATIENCE, reader.read_exact(&mut payload)).await {
            Ok(Ok(_)) => {}
            _ => return Err(format!("the payload of `{}` did not come", put.topic)),
        }
        let place = window.clone().acquire_owned().await.map_err(|error| error.to_string())?;
        let number = done.messages;
        done.messages += 1;
        done.bytes += put.size;
        submit(put, payload, number, place, engine, answers).await?;
    }
    // Everything is answered when all places are free again.
    let all = u32::try_from(WINDOW).unwrap_or(u32::MAX);
    let _all = window.acquire_many(all).await.map_err(|error| error.to_string())?;
    answers.say(Answer::Done(done)).await;
    Ok(())
}

async fn submit(
    put: Put,
    payload: Vec<u8>,
    number: u64,
    place: OwnedSemaphorePermit,
    engine: &Engine,
    answers: &Answers,
) -> Result<(), String> {
    let publish = Publish {
        topic: put.topic,
        payload: Bytes::from(payload),
        qos: Qos::from_number(put.qos).unwrap_or(Qos::AtLeastOnce),
        retain: true,
        packet_id: 0,
        duplicate: false,
        properties: put.properties,
    };
    let topic = publish.topic.as_str().into();
    // What an index held it takes back: what clients may send has changed since, or it was made whole of chunks.
    let limits = Arc::new(Limits { package: PACKAGE, packet: PACKET, ..(*engine.limits).clone() });
    let heavy = limits.clone();
    let admitted = match is_heavy(&publish) {
        false => admit(publish, &limits),
        true => spawn_blocking(move || admit(publish, &heavy)).await.map_err(|error| error.to_string())?,
    };
    let to = Arc::new(Mailbox::new(&limits));
    let reply = Some(Reply { to: to.clone(), packet_id: 0 });
    let expected = Some(put.expected);
    let submission = Submission { admitted, topic, origin: BROKER, reply, place: None, expected };
    let op = Op::Publish(Box::new(submission));
    engine.ops.send(op).await.map_err(|_| "the index has stopped")?;
    let (answers, stopped) = (answers.clone(), engine.ops.clone());
    tokio::spawn(async move {
        let refused = loop {
            if let Some(Settled::Published { result, .. }) = to.pop_settled() {
                break result.err().map(|refusal| refusal.text);
            }
            tokio::select! {
                () = to.arrived() => {}
                () = stopped.closed() => break Some("the index has stopped".to_owned()),
            }
        };
        answers.say(Answer::Put { number, refused }).await;
        drop(place);
    });
    Ok(())
}

/// What garbage is asked to go.
#[derive(Debug, Clone, Copy, Default)]
pub struct Asked {
    /// None: only say what would.
    pub dry_run: bool,
    /// How many lists of each channel count; the broker's setting if not said.
    pub keep: Option<usize>,
    /// How long what was seen stays; the broker's setting if not said.
    pub grace: Option<Duration>,
}

/// Removes garbage, in small commits; `told` gets each package before it goes, and ends all by saying no.
///
/// # Errors
/// Says why it cannot.
pub async fn collect<F: Future<Output = bool>>(
    engine: &Engine,
    asked: Asked,
    mut told: impl FnMut(crate::index::collect::Garbage) -> F,
) -> Result<Done, String> {
    let lists = asked.keep.unwrap_or(engine.limits.gc_keep);
    if lists > REMEMBERED {
        return Err(format!("only the last {REMEMBERED} lists of a channel are remembered"));
    }
    let grace = asked.grace.unwrap_or(engine.limits.gc_grace);
    let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
    let since_ms = clock::now().unix_ms.saturating_sub(grace_ms);
    let index = engine.index.clone();
    let garbage = blocking(move || index.garbage(Rules { lists, since_ms })).await?;
    let mut done = Done::default();
    let mut garbage = garbage.into_iter();
    loop {
        let mut topics = Vec::new();
        for garbage in garbage.by_ref().take(COLLECTED_AT_ONCE) {
            if asked.dry_run {
                done.messages += 1;
                done.bytes += garbage.size;
            }
            topics.push(garbage.topic.clone());
            if !told(garbage).await {
                return Ok(done);
            }
        }
        let is_last = topics.len() < COLLECTED_AT_ONCE;
        if !asked.dry_run {
            let (reply, removed) = oneshot::channel();
            let op = Op::Collect(Collect { topics, since_ms, reply });
            engine.ops.send(op).await.map_err(|_| "the index has stopped")?;
            let removed = removed.await.map_err(|_| "the index failed, or is full")?;
            done.messages += removed.messages;
            done.bytes += removed.bytes;
        }
        if is_last {
            return Ok(done);
        }
    }
}

/// The next line; `None` at the end.
async fn line(reader: &mut BufReader<OwnedReadHalf>) -> Result<Option<String>, String> {
    let mut line = String::new();
    match reader.take(LINE).read_line(&mut line).await {
        Ok(0) => Ok(None),
        Ok(_) if !line.ends_with('\n') => Err("a line is too long, or has no end".to_owned()),
        Ok(_) => Ok(Some(line)),
        Err(error) => Err(error.to_string()),
    }
}
