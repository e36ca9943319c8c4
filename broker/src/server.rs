//! Starts everything, accepts connections, and stops everything.

use std::{io, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc},
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    access::{gate::Gate, users::UsersError},
    bus::{self, BusError, SharedSubscriptions},
    connection::{self, PLACE, Shared},
    index::{
        Index, IndexError,
        writer::{QUEUE, Writer},
    },
    limits::Limits,
    message::SessionId,
    registry::Registry,
};

/// After a failure to accept, as with too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Where to serve, and from what.
#[derive(Debug, Clone)]
pub struct Config {
    /// Addresses to listen on; port 0 picks a free one.
    pub listen: Vec<SocketAddr>,
    /// The folder of the index.
    pub data: PathBuf,
    /// The limits.
    pub limits: Limits,
    /// Whether strangers from other machines may come in while there are no users.
    pub access: Access,
}

/// Who may connect while there are no users.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Only this machine.
    Loopback,
    /// Everyone who can reach a listener.
    UnsafeOpen,
}

/// The broker cannot start, or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// An address cannot be listened on.
    #[error("cannot listen on {address}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// Nothing to listen on.
    #[error("there is no address to listen on")]
    NoListener,
    /// An address of other machines, without leave for it.
    #[error("listening on {0} would let everyone in, without credentials")]
    Open(SocketAddr),
    /// The files of users and rules are not in order.
    #[error(transparent)]
    Users(#[from] UsersError),
    /// The index fails.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// The bus fails.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// A thread cannot be started.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
    /// A thread panicked; what went wrong is in the log.
    #[error("the thread `{0}` panicked")]
    Panicked(&'static str),
    /// Not everything stopped in time.
    #[error("not everything stopped within {} s", .0.as_secs())]
    Stuck(Duration),
}

/// A broker that has its addresses and its index, and serves once it [runs](Broker::run).
#[derive(Debug)]
pub struct Broker {
    config: Config,
    listeners: Vec<TcpListener>,
    addresses: Vec<SocketAddr>,
    index: Index,
    gate: Gate,
}

impl Broker {
    /// Binds all addresses and opens the index.
    ///
    /// # Errors
    /// Says what cannot be had.
    pub async fn bind(config: Config) -> Result<Broker, ServeError> {
        if config.listen.is_empty() {
            return Err(ServeError::NoListener);
        }
        let gate = Gate::open(config.data.clone())?;
        let mut listeners = Vec::new();
        let mut addresses = Vec::new();
        for &address in &config.listen {
            let is_open = config.access == Access::Loopback && !gate.is_guarded();
            if is_open && !address.ip().is_loopback() {
                return Err(ServeError::Open(address));
            }
            let failed = |source| ServeError::Listen { address, source };
            let listener = TcpListener::bind(address).await.map_err(failed)?;
            addresses.push(listener.local_addr().map_err(failed)?);
            listeners.push(listener);
        }
        let index = Index::open(&config.data)?;
        Ok(Broker { config, listeners, addresses, index, gate })
    }

    /// The addresses bound, in the order asked for.
    #[must_use]
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Whether clients have to log in.
    #[must_use]
    pub fn is_guarded(&self) -> bool {
        self.gate.is_guarded()
    }

    /// Serves until `shutdown`, and returns when everything has stopped.
    ///
    /// # Errors
    /// The index or the bus failed, or something would not stop.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), ServeError> {
        let limits = Arc::new(self.config.limits);
        let subscriptions = SharedSubscriptions::default();
        let (mut sender, dispatcher, tickets) = bus::start(subscriptions.clone())?;
        let failed = CancellationToken::new();
        let announce_failed = failed.clone();
        let announce = Box::new(move |message, chosen| {
            if let Err(error) = sender.send(message, chosen) {
                tracing::error!(%error, "cannot announce a message");
                announce_failed.cancel();
            }
        });
        let writer = Writer::new(self.index.clone(), limits.clone(), subscriptions.clone(), announce)?;
        let (ops, waiting) = mpsc::channel(QUEUE);
        let runtime = tokio::runtime::Handle::current();
        let writer = spawn("index", &failed, move || {
            let _context = runtime.enter();
            writer.run(waiting).map_err(ServeError::from)
        })?;
        let dispatcher = spawn("bus", &failed, move || dispatcher.run().map_err(ServeError::from))?;

        let stop = CancellationToken::new();
        let shared = Arc::new(Shared {
            index: self.index,
            ops,
            tickets,
            subscriptions,
            places: Arc::new(Semaphore::new(limits.inbound_bytes / PLACE)),
            clients: Arc::new(Semaphore::new(limits.clients)),
            sockets: Arc::new(Semaphore::new(limits.clients + limits.strangers)),
            shutdown: stop.clone(),
            gate: self.gate,
            registry: Registry::default(),
            limits: limits.clone(),
        });
        let tasks = TaskTracker::new();
        for listener in self.listeners {
            tasks.spawn(accept(listener, shared.clone(), tasks.clone()));
        }
        let watched = shared.clone();
        tasks.spawn(async move {
            let revoke = || watched.registry.revoke(|login| watched.gate.still_knows(login));
            tokio::select! {
                () = watched.gate.watch(revoke) => {}
                () = watched.shutdown.cancelled() => {}
            }
        });
        tasks.close();
        tokio::select! {
            () = shutdown.cancelled() => tracing::info!("stopping"),
            () = failed.cancelled() => tracing::error!("a part failed: stopping"),
        }
        stop.cancel();
        shared.registry.close();
        // Connections first, so that their wills still reach the index; then the index, then the bus.
        drop(shared);
        let all = async {
            tasks.wait().await;
            // Both, so that neither runs on; the first error is the cause.
            writer.await.and(dispatcher.await)
        };
        timeout(limits.shutdown, all).await.unwrap_or(Err(ServeError::Stuck(limits.shutdown)))
    }
}

/// Runs `work` on a thread of its own, and hands back how it ended; its end cancels `ended`.
fn spawn(
    name: &'static str,
    ended: &CancellationToken,
    work: impl FnOnce() -> Result<(), ServeError> + Send + 'static,
) -> Result<impl Future<Output = Result<(), ServeError>>, ServeError> {
    let (done, outcome) = tokio::sync::oneshot::channel();
    let ended = ended.clone();
    let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        // Also when the work panics.
        let _guard = ended.drop_guard();
        done.send(work()).ok();
    });
    thread.map_err(ServeError::Thread)?;
    Ok(async move { outcome.await.unwrap_or(Err(ServeError::Panicked(name))) })
}

async fn accept(listener: TcpListener, shared: Arc<Shared>, tasks: TaskTracker) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = shared.shutdown.cancelled() => return,
        };
        match accepted {
            Ok((socket, peer)) => {
                let Ok(place) = shared.sockets.clone().try_acquire_owned() else {
                    tracing::warn!(%peer, "too many connections: closed at once");
                    continue;
                };
                let (id, shared) = (shared.registry.next_id(), shared.clone());
                tasks.spawn(async move {
                    serve(socket, peer, id, &shared).await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn serve(socket: TcpStream, peer: SocketAddr, id: SessionId, shared: &Shared) {
    // Without it, eight small files take 400 ms.
    if let Err(error) = socket.set_nodelay(true) {
        return tracing::debug!(%peer, %error, "lost at once");
    }
    connection::serve(socket, peer, id, shared).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_thread_that_panics_stops_everything_and_is_an_error() {
        let ended = CancellationToken::new();
        let outcome = spawn("test", &ended, || panic!("on purpose")).unwrap();
        ended.cancelled().await;
        assert!(matches!(outcome.await, Err(ServeError::Panicked("test"))));
    }
}
