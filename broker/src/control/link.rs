//! The asking side.

use std::{
    io::{self, BufRead, BufReader, BufWriter, Read, Write},
    net::Shutdown,
    os::unix::{fs::MetadataExt, net::UnixStream},
    path::{Path, PathBuf},
    sync::Arc,
    thread::{self, JoinHandle},
    time::Duration,
};

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{Answer, Done, Engine, Put, Request, server};
use crate::{
    bus::SharedSubscriptions,
    index::{
        Index, IndexError,
        writer::{QUEUE, Writer},
    },
    limits::Limits,
};

/// How long a broker may say nothing.
const PATIENCE: Duration = Duration::from_secs(300);

/// A way to ask the index of a data folder one thing.
#[derive(Debug)]
pub struct Link {
    stream: BufReader<UnixStream>,
    /// The index, opened by this process because no broker runs.
    own: Option<JoinHandle<()>>,
    stop: CancellationToken,
}

/// The index cannot be asked.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// There is no index.
    #[error("there is no index in `{}`", .0.display())]
    Nothing(PathBuf),
    /// The running broker does not let us in.
    #[error("cannot reach the broker of `{}`", path.display())]
    Socket {
        /// The data folder.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// As root we would leave files that the broker cannot change.
    #[error("the index in `{}` belongs to another user, and no broker runs to be asked", path.display())]
    Owner {
        /// The data folder.
        path: PathBuf,
        /// The number of the user.
        user: u32,
    },
    /// The index cannot be opened.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// The connection broke.
    #[error("the broker has gone in the middle of it")]
    Broken(#[source] io::Error),
    /// The broker says what an earlier or later one would.
    #[error("the broker answers in another language: is it of another version?")]
    Foreign(#[source] serde_json::Error),
    /// It cannot be done.
    #[error("{0}")]
    Failed(String),
}

/// Whether a folder without an index gets one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Missing {
    /// It is an error.
    Refuse,
    /// An empty one is made.
    Create,
}

impl Link {
    /// A link to the broker that runs on `data`, or to the index itself if none does.
    ///
    /// # Errors
    /// Neither can be had.
    pub fn open(data: &Path, missing: Missing) -> Result<Link, LinkError> {
        let stop = CancellationToken::new();
        match server::with_short_path(data, |path| UnixStream::connect(path)) {
            Ok(stream) => {
                stream.set_read_timeout(Some(PATIENCE)).map_err(LinkError::Broken)?;
                stream.set_write_timeout(Some(PATIENCE)).map_err(LinkError::Broken)?;
                return Ok(Link { stream: BufReader::new(stream), own: None, stop });
            }
            // None runs, or one was killed.
            Err(error)
                if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {}
            Err(source) => return Err(LinkError::Socket { path: data.to_owned(), source }),
        }
        if missing == Missing::Refuse && !data.join("index.redb").exists() {
            return Err(LinkError::Nothing(data.to_owned()));
        }
        let owner = std::fs::metadata(data).map(|found| found.uid());
        if let Ok(user) = owner
            && user != 0
            && rustix::process::geteuid().is_root()
        {
            return Err(LinkError::Owner { path: data.to_owned(), user });
        }
        let index = Index::open(data)?;
        let (ours, theirs) = UnixStream::pair().map_err(LinkError::Broken)?;
        theirs.set_nonblocking(true).map_err(LinkError::Broken)?;
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(LinkError::Broken)?;
        let limits = Arc::new(Limits::default());
        let (subscriptions, nobody) = (SharedSubscriptions::default(), Box::new(|_, _| {}));
        let writer = Writer::new(index.clone(), limits.clone(), subscriptions, nobody)?;
        let (ops, waiting) = mpsc::channel(QUEUE);
        let engine = Engine { index, ops, limits, shutdown: stop.clone() };
        let own = thread::spawn(move || {
            let handle = runtime.handle().clone();
            let writer = thread::spawn(move || {
                let _context = handle.enter();
                writer.run(waiting)
            });
            runtime.block_on(async {
                match tokio::net::UnixStream::from_std(theirs) {
                    Ok(stream) => server::serve(stream, &engine).await,
                    Err(error) => tracing::error!(%error, "cannot use a pair of sockets"),
                }
            });
            drop(engine);
            // What was put is durable when it is answered; this is for the database to be closed properly.
            if let Ok(Err(error)) = writer.join() {
                tracing::error!(%error, "the index failed");
            }
        });
        Ok(Link { stream: BufReader::new(ours), own: Some(own), stop })
    }

    /// Whether a broker runs.
    #[must_use]
    pub fn is_live(&self) -> bool {
        self.own.is_none()
    }

    /// Asks, and hands each answer to `take` until the last.
    ///
    /// # Errors
    /// It cannot be done, or `take` failed.
    pub fn ask<E: From<LinkError>>(
        &mut self,
        request: &Request,
        take: impl FnMut(Answer) -> Result<(), E>,
    ) -> Result<Done, E> {
        let stream = self.stream.get_mut();
        say(stream, request)?;
        answers(&mut self.stream, take)
    }

    /// Begins to put messages; answers are handed to `take` on the way, and the last ones at the end.
    ///
    /// # Errors
    /// The broker has gone.
    pub fn upload(mut self) -> Result<Upload, LinkError> {
        say(self.stream.get_mut(), &Request::Put)?;
        let reader = self.stream.get_ref().try_clone().map_err(LinkError::Broken)?;
        // Answers are read while messages are sent, so that neither side waits for the other.
        let refused = thread::spawn(move || {
            let mut refused = Vec::new();
            let done = answers(&mut BufReader::new(reader), |answer| {
                if let Answer::Put { number, refused: Some(why) } = answer {
                    refused.push((number, why));
                }
                Ok::<(), LinkError>(())
            });
            done.map(|_| refused)
        });
        let writer = self.stream.get_ref().try_clone().map_err(LinkError::Broken)?;
        Ok(Upload { writer: BufWriter::new(writer), refused, _link: self })
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.stream.get_ref().shutdown(Shutdown::Both).ok();
        self.stop.cancel();
        if let Some(own) = self.own.take() {
            own.join().ok();
        }
    }
}

/// Messages being put.
pub struct Upload {
    writer: BufWriter<UnixStream>,
    refused: JoinHandle<Result<Vec<(u64, String)>, LinkError>>,
    _link: Link,
}

impl Upload {
    /// Puts a message with the payload that `from` gives.
    ///
    /// # Errors
    /// The broker has gone, or `from` cannot be read to its end.
    pub fn put(&mut self, put: &Put, from: &mut impl Read) -> Result<(), LinkError> {
        say(&mut self.writer, put)?;
        match io::copy(&mut from.take(put.size), &mut self.writer).map_err(LinkError::Broken)? {
            copied if copied == put.size => Ok(()),
            _ => Err(LinkError::Broken(io::ErrorKind::UnexpectedEof.into())),
        }
    }

    /// Waits for everything to be answered, and says which messages were refused and why.
    ///
    /// # Errors
    /// The broker has gone, or gave up.
    pub fn finish(self) -> Result<Vec<(u64, String)>, LinkError> {
        let Upload { writer, refused, _link } = self;
        let writer = writer.into_inner().map_err(|error| LinkError::Broken(error.into_error()));
        // What the broker said last tells more than that it is gone.
        let sent = writer.and_then(|writer| writer.shutdown(Shutdown::Write).map_err(LinkError::Broken));
        let refused =
            refused.join().map_err(|_| LinkError::Failed("reading answers failed".to_owned()))??;
        sent.map(|()| refused)
    }
}

fn say(to: &mut impl Write, what: &impl serde::Serialize) -> Result<(), LinkError> {
    let mut line = serde_json::to_vec(what).map_err(LinkError::Foreign)?;
    line.push(b'\n');
    to.write_all(&line).map_err(LinkError::Broken)
}

fn answers<E: From<LinkError>>(
    from: &mut impl BufRead,
    mut take: impl FnMut(Answer) -> Result<(), E>,
) -> Result<Done, E> {
    let mut line = String::new();
    loop {
        line.clear();
        let count = from.read_line(&mut line).map_err(LinkError::Broken)?;
        if count == 0 {
            return Err(LinkError::Broken(io::ErrorKind::UnexpectedEof.into()).into());
        }
        match serde_json::from_str(&line).map_err(LinkError::Foreign)? {
            Answer::Done(done) => return Ok(done),
            Answer::Failed { error } => return Err(LinkError::Failed(error).into()),
            answer => take(answer)?,
        }
    }
}
