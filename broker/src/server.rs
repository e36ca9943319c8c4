//! Starts everything, accepts connections, and stops everything.

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use tokio::{
    runtime::Handle,
    sync::{Semaphore, mpsc},
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    access::{gate::Gate, users::UsersError},
    bus::{self, BusError, SharedSubscriptions},
    clock,
    connection::{PLACE, Shared},
    control::{self, Done, Engine, Socket},
    edge::{self, Edge, Part},
    faces::{
        home::{self, Home},
        thingsboard::desk::Desk,
    },
    fleet::{self, Fleet},
    gateway::{Gateway, HttpEndpoint, HttpListener, Place},
    index::{
        Index, IndexError,
        writer::{QUEUE, Told, Writer},
    },
    limits::Limits,
    listen::{
        Endpoint, Listener,
        tls::{Files, Tls, TlsError, Watch},
    },
    metrics::Metrics,
    mpyblox::SharedDesk,
    pulse::Pulse,
    registry::Registry,
    service, sys,
};

/// Garbage is collected no earlier than so long after the start, in milliseconds: others are busy then.
const GC_AFTER_START: u64 = 60_000;

/// Where to serve, and from what.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where to listen, and for what.
    pub listen: Vec<Endpoint>,
    /// The certificates of those with TLS.
    pub tls: Option<Files>,
    /// Where to listen for HTTP, and what to show there.
    pub http: Vec<Place>,
    /// The folder of the index.
    pub data: PathBuf,
    /// The limits.
    pub limits: Limits,
    /// Whether strangers from other machines may come in while there are no users.
    pub access: Access,
    /// What Home Assistant is told of the nodes, if anything.
    pub home: Option<Home>,
    /// The broker whose channels are served here, if there is one.
    pub upstream: Option<edge::Config>,
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
    #[error("cannot listen on {endpoint}")]
    Listen {
        /// The address.
        endpoint: Endpoint,
        /// Why not.
        source: io::Error,
    },
    /// Nothing to listen on.
    #[error("there is no address to listen on")]
    NoListener,
    /// An address of other machines, without leave for it.
    #[error("listening on {0} would let everyone in, without credentials")]
    Open(Endpoint),
    /// TLS without a certificate.
    #[error("listening on {0} needs a certificate and its key")]
    NoCertificate(Endpoint),
    /// The certificates are not in order.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// An address cannot be listened on for HTTP.
    #[error("cannot listen on {endpoint}")]
    ListenHttp {
        /// The address.
        endpoint: HttpEndpoint,
        /// Why not.
        source: io::Error,
    },
    /// HTTPS without a certificate.
    #[error("listening on {0} needs a certificate and its key")]
    NoHttpCertificate(HttpEndpoint),
    /// HTTP on an address of other machines, without leave for it.
    #[error("listening on {0} would let everyone in, without credentials")]
    OpenHttp(HttpEndpoint),
    /// The files of users and rules are not in order.
    #[error(transparent)]
    Users(#[from] UsersError),
    /// What is remembered of the upstream cannot be read or written.
    #[error("cannot use `{}` in the data folder", edge::memory::FILE)]
    Edge(#[source] io::Error),
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
    listeners: Vec<Listener>,
    tls: Option<Arc<Tls>>,
    http: Vec<HttpListener>,
    control: Option<Socket>,
    index: Index,
    gate: Gate,
    upstream: Option<(Arc<Edge>, edge::Desk)>,
}

impl Broker {
    /// Binds all addresses and opens the index.
    ///
    /// # Errors
    /// Says what cannot be had.
    pub async fn bind(config: Config) -> Result<Broker, ServeError> {
        // A gateway has HTTP alone.
        let is_gateway = config.upstream.as_ref().is_some_and(|upstream| upstream.part == Part::Gateway);
        if config.listen.is_empty() && (!is_gateway || config.http.is_empty()) {
            return Err(ServeError::NoListener);
        }
        let gate = Gate::open(config.data.clone())?;
        let tls = config.tls.clone().map(Tls::load).transpose()?.map(Arc::new);
        let mut listeners = Vec::new();
        for &endpoint in &config.listen {
            let needs_certificate = match &tls {
                Some(tls) => endpoint.transport.is_tls() && tls.requires_certificate(),
                None if endpoint.transport.is_tls() => return Err(ServeError::NoCertificate(endpoint)),
                None => false,
            };
            let is_guarded = needs_certificate || gate.is_guarded() || config.access == Access::UnsafeOpen;
            if !is_guarded && !endpoint.address.ip().is_loopback() {
                return Err(ServeError::Open(endpoint));
            }
            let listener = Listener::bind(endpoint, tls.clone()).await;
            listeners.push(listener.map_err(|source| ServeError::Listen { endpoint, source })?);
        }
        let mut http = Vec::new();
        for place in &config.http {
            let endpoint = place.endpoint;
            let needs_certificate = match &tls {
                Some(tls) => endpoint.is_tls && tls.requires_certificate(),
                None if endpoint.is_tls => return Err(ServeError::NoHttpCertificate(endpoint)),
                None => false,
            };
            let is_guarded = needs_certificate || gate.is_guarded() || config.access == Access::UnsafeOpen;
            if !is_guarded && !place.site.is_for_all() && !endpoint.address.ip().is_loopback() {
                return Err(ServeError::OpenHttp(endpoint));
            }
            let listener = HttpListener::bind(place.clone(), tls.clone()).await;
            http.push(listener.map_err(|source| ServeError::ListenHttp { endpoint, source })?);
        }
        let index = Index::open(&config.data)?;
        let control = Socket::bind(&config.data).inspect_err(|error| {
            tracing::error!(%error, "commands cannot reach this broker while it runs");
        });
        let upstream = config.upstream.clone().map(|upstream| Edge::open(upstream, &config.data));
        let upstream = upstream.transpose().map_err(ServeError::Edge)?;
        Ok(Broker { config, listeners, tls, http, control: control.ok(), index, gate, upstream })
    }

    /// What is listened for, in the order asked for.
    pub fn endpoints(&self) -> impl Iterator<Item = Endpoint> {
        self.listeners.iter().map(Listener::endpoint)
    }

    /// Where HTTP is listened for, and what is shown there, in the order asked for.
    pub fn http(&self) -> impl Iterator<Item = &Place> {
        self.http.iter().map(HttpListener::place)
    }

    /// Whether clients have to log in.
    #[must_use]
    pub fn is_guarded(&self) -> bool {
        self.gate.is_guarded()
    }

    /// What this broker is to an upstream, and where that is, if there is one.
    #[must_use]
    pub fn upstream(&self) -> Option<(Part, String)> {
        self.upstream.as_ref().map(|(edge, _)| (edge.part(), edge.upstream()))
    }

    /// What people should know about the way to the upstream, one sentence each.
    pub fn warnings(&self) -> impl Iterator<Item = &str> {
        let endpoints = self.config.upstream.iter().flat_map(|upstream| &upstream.endpoints);
        endpoints.flat_map(|endpoint| endpoint.warnings()).map(String::as_str)
    }

    /// Serves until `shutdown`, and returns when everything has stopped.
    ///
    /// # Errors
    /// The index or the bus failed, or something would not stop.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), ServeError> {
        let limits = Arc::new(self.config.limits);
        let subscriptions = SharedSubscriptions::default();
        let (mut sender, dispatcher, tickets) = bus::start(subscriptions.clone(), Handle::current())?;
        let failed = CancellationToken::new();
        let announce_failed = failed.clone();
        let announce = Box::new(move |message, chosen| {
            if let Err(error) = sender.send(message, chosen) {
                tracing::error!(%error, "cannot announce a message");
                announce_failed.cancel();
            }
        });
        let metrics = Arc::new(Metrics::default());
        let writer = Writer::new(self.index.clone(), limits.clone(), subscriptions.clone(), announce)?
            .counting(metrics.clone())
            .leaving(self.upstream.as_ref().map(|(edge, _)| Arc::new(edge.owned())))
            .noting(self.upstream.as_ref().and_then(|(edge, _)| {
                let edge = edge.clone();
                edge.told()?;
                Some(Box::new(move || edge.told().unwrap_or_default()) as Told)
            }));
        let (ops, waiting) = mpsc::channel(QUEUE);
        let runtime = Handle::current();
        let writer = spawn("index", &failed, move || {
            let _context = runtime.enter();
            writer.run(waiting).map_err(ServeError::from)
        })?;
        let dispatcher = spawn("bus", &failed, move || dispatcher.run().map_err(ServeError::from))?;

        let stop = CancellationToken::new();
        let (edge, desk) = self.upstream.unzip();
        let shared = Arc::new(Shared {
            edge: edge.clone(),
            metrics,
            pulse: Pulse::new(&subscriptions, &tickets, &limits),
            fleet: Fleet::new(&subscriptions, &tickets, &limits),
            index: self.index,
            ops,
            tickets,
            subscriptions,
            places: Arc::new(Semaphore::new(limits.inbound_bytes / PLACE)),
            clients: Arc::new(Semaphore::new(limits.clients)),
            sockets: Arc::new(Semaphore::new(limits.clients + limits.strangers)),
            http: Arc::new(Semaphore::new(limits.http_clients)),
            events: Arc::new(Semaphore::new(limits.http_events)),
            shutdown: stop.clone(),
            gate: self.gate,
            home: self.config.home,
            access: self.config.access,
            registry: Registry::default(),
            mpyblox: SharedDesk::default(),
            things: Desk::default(),
            limits: limits.clone(),
        });
        sys::renew(&shared);
        let tasks = TaskTracker::new();
        for listener in self.listeners {
            tasks.spawn(listener.accept(shared.clone(), tasks.clone()));
        }
        let engine = Engine {
            index: shared.index.clone(),
            ops: shared.ops.clone(),
            limits: limits.clone(),
            shutdown: stop.clone(),
        };
        if let Some(control) = self.control {
            tasks.spawn(control.serve(engine.clone(), tasks.clone()));
        }
        tasks.spawn(stop.clone().run_until_cancelled_owned(async move { collect_daily(&engine).await }));
        let gateway = Arc::new(Gateway::new(shared.clone()));
        for listener in self.http {
            tasks.spawn(listener.accept(gateway.clone(), tasks.clone()));
        }
        drop(gateway);
        if let (Some(edge), Some(desk)) = (edge, desk) {
            tasks.spawn(edge.run(shared.clone(), desk));
        }
        tasks.spawn(stop.clone().run_until_cancelled_owned(fleet::keep(shared.clone())));
        let told = shared.clone();
        tasks.spawn(stop.clone().run_until_cancelled_owned(async move { sys::keep(&told).await }));
        tasks.spawn(stop.clone().run_until_cancelled_owned(home::keep(shared.clone())));
        let watched = shared.clone();
        tasks.spawn(stop.clone().run_until_cancelled_owned(async move {
            let revoke = || watched.registry.revoke(|login| watched.gate.still_knows(login));
            watched.gate.watch(revoke).await;
        }));
        if let Some(tls) = self.tls {
            tasks.spawn(stop.clone().run_until_cancelled_owned(recheck(tls.watch(), shared.clone())));
        }
        service::ready();
        let felt = shared.clone();
        tasks.spawn(stop.clone().run_until_cancelled_owned(async move { service::watch(&felt).await }));
        tasks.close();
        tokio::select! {
            () = shutdown.cancelled() => tracing::info!("stopping"),
            () = failed.cancelled() => tracing::error!("a part failed: stopping"),
        }
        service::stopping();
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

/// Collects garbage, each [`Limits::gc_every`] after the last time, also across restarts.
async fn collect_daily(engine: &Engine) {
    if engine.limits.gc_every.is_zero() {
        return;
    }
    let every = u64::try_from(engine.limits.gc_every.as_millis()).unwrap_or(u64::MAX);
    loop {
        let now_ms = clock::now().unix_ms;
        // After a failure too, wait for the full time.
        let last = engine.index.collected_ms().unwrap_or(now_ms).min(now_ms);
        let wait = last.saturating_add(every).saturating_sub(now_ms).max(GC_AFTER_START);
        sleep(Duration::from_millis(wait)).await;
        match control::collect(engine, control::Asked::default(), |_| async { true }).await {
            Ok(Done { messages: 0, .. }) => tracing::debug!("no garbage"),
            Ok(Done { messages, bytes }) => {
                tracing::info!(messages, bytes, "removed packages that no list has named for long");
            }
            Err(error) => tracing::error!(error, "cannot collect garbage"),
        }
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

/// Sends away who came in with a certificate that none of the authorities has signed any more, whenever they change,
/// until dropped.
async fn recheck(mut certificates: Watch, shared: Arc<Shared>) {
    loop {
        certificates.authorities_changed().await;
        let watched = shared.clone();
        let work = move || {
            // Signatures are checked before the registry is held, and remembered.
            for login in watched.registry.logins() {
                let _ = watched.gate.still_knows(Some(&login));
            }
            watched.registry.revoke(|login| watched.gate.still_knows(login));
        };
        if let Err(error) = tokio::task::spawn_blocking(work).await {
            tracing::error!(%error, "cannot look at the certificates of those connected");
        }
    }
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
