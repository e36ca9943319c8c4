//! `mpypi-broker serve`

use std::{
    io::Write,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
};

use mpypi_broker::{
    Access, Broker, Config, ServeError,
    authority::AuthorityError,
    edge::Part,
    gateway::HttpEndpoint,
    index::IndexError,
    listen::{Endpoint, Transport, tls::TlsError},
    settings::{self, ListenerSettings, Settings, SettingsError},
};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::{
    cli::{GatewayArgs, ServeArgs, SiteArgs, UpstreamArgs},
    log,
};

/// Where to listen if nothing is said.
pub(crate) const DEFAULT: Endpoint = Endpoint {
    transport: Transport::Tcp,
    address: SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 1883),
};

/// Where a gateway listens if nothing is said.
const HTTP: HttpEndpoint =
    HttpEndpoint { is_tls: false, address: SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 8080) };

/// The folder of the index if nothing is said.
pub(crate) const DATA: &str = "data";

pub(crate) fn run(args: ServeArgs) -> anyhow::Result<()> {
    run_as(Part::Edge, args)
}

/// `mpypi-broker gateway`
pub(crate) fn run_gateway(args: GatewayArgs) -> anyhow::Result<()> {
    let GatewayArgs { upstream, mut http, data, site } = args;
    if http.is_empty() && site.config.is_none() {
        http.push(HTTP);
    }
    // A copy that nobody named is nobody's.
    let passing = match data {
        Some(_) => None,
        None => Some(tempfile::Builder::new().prefix("mpypi-gateway-").tempdir()?),
    };
    let data = data.or_else(|| passing.as_ref().map(|folder| folder.path().to_owned()));
    run_as(Part::Gateway, ServeArgs { upstream, http, data, site, ..ServeArgs::default() })
}

fn run_as(part: Part, args: ServeArgs) -> anyhow::Result<()> {
    let (settings, found) = settings(&args)?;
    let gate = log::to_stderr(settings.log_json, "info")?;
    if let Some(path) = found {
        tracing::info!(path = %path.display(), "configuration read");
    }
    let http = settings.places()?;
    let home = settings.home()?;
    let mut limits = settings.limits;
    match rlimit::increase_nofile_limit(u64::MAX) {
        Ok(files) => limits.fit_into(usize::try_from(files).unwrap_or(usize::MAX)),
        Err(error) => tracing::warn!(%error, "cannot raise the limit of open files: fewer clients may fit"),
    }
    let upstream = settings.upstream.upstream(part)?;
    let mut listen: Vec<_> = settings.listeners.into_iter().map(|listener| listener.url).collect();
    match part {
        Part::Gateway if upstream.is_none() => return Err(SettingsError::NoUpstream.into()),
        Part::Gateway => listen.clear(),
        Part::Edge if listen.is_empty() => listen.push(DEFAULT),
        Part::Edge => {}
    }
    let access = if settings.unsafe_open { Access::UnsafeOpen } else { Access::Loopback };
    let data = settings.data.unwrap_or_else(|| DATA.into());
    let config = Config { listen, http, tls: settings.tls.files()?, data, limits, access, home, upstream };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let outcome = runtime.block_on(serve(config, gate));
    // rumqttd's router has no way to stop: its thread ends with the process.
    runtime.shutdown_background();
    outcome
}

/// What the command line and the configuration file say together, and which file that was.
fn settings(args: &ServeArgs) -> anyhow::Result<(Settings, Option<PathBuf>)> {
    let usual = args.data.as_deref().unwrap_or(Path::new(DATA)).join(settings::FILE);
    let found = args.site.config.clone().or_else(|| usual.exists().then_some(usual));
    let mut settings = match &found {
        Some(path) => Settings::load(path)?,
        None => Settings::default(),
    };
    if !args.listen.is_empty() {
        settings.listeners = args.listen.iter().map(|&url| ListenerSettings { url }).collect();
    }
    let tls = &mut settings.tls;
    let ServeArgs { data, tls_client_ca, site: SiteArgs { tls_cert, tls_key, .. }, .. } = args;
    for (given, setting) in [
        (data, &mut settings.data),
        (tls_cert, &mut tls.cert),
        (tls_key, &mut tls.key),
        (tls_client_ca, &mut tls.client_ca),
    ] {
        if given.is_some() {
            setting.clone_from(given);
        }
    }
    let upstream = &mut settings.upstream;
    if !args.upstream.upstream.is_empty() {
        upstream.url.clone_from(&args.upstream.upstream);
    }
    if !args.upstream.upstream_channel.is_empty() {
        upstream.channels = Some(args.upstream.upstream_channel.clone());
    }
    let UpstreamArgs { upstream_ca, upstream_pin, .. } = &args.upstream;
    for (given, setting) in [(upstream_ca, &mut upstream.ca), (upstream_pin, &mut upstream.pin)] {
        if given.is_some() {
            setting.clone_from(given);
        }
    }
    tls.client_auth = args.tls_client_auth.map(Into::into).or(tls.client_auth);
    if !args.http.is_empty() {
        settings.http.clone_from(&args.http);
    }
    let promoter = &mut settings.promoter;
    promoter.channel = args.site.promoter_channel.clone().or(promoter.channel.take());
    promoter.address = args.promoter.or(promoter.address);
    promoter.unsafe_open |= args.unsafe_promoter;
    settings.home_assistant.enabled |= args.home_assistant;
    settings.log_json |= args.site.log_json;
    settings.unsafe_open |= args.site.unsafe_open;
    settings.limits.package = args.max_package.unwrap_or(settings.limits.package);
    settings.limits.check()?;
    Ok((settings, found))
}

async fn serve(config: Config, gate: Arc<log::Gate>) -> anyhow::Result<()> {
    let shutdown = CancellationToken::new();
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let open = config.access == Access::UnsafeOpen;
    let data = config.data.display().to_string();
    let broker = Broker::bind(config).await?;
    // The first line is for programs: it tells the port. Whoever reads no further does not end the broker.
    let mqtt = broker.endpoints().map(|endpoint| endpoint.to_string());
    let http = broker.http().map(|place| place.endpoint.to_string());
    let places: String = mqtt.chain(http).map(|place| format!("listening on {place}\n")).collect();
    let mut out = std::io::stdout();
    if let Err(error) = out.write_all(places.as_bytes()).and_then(|()| out.flush()) {
        tracing::warn!(%error, "cannot say where the broker listens");
    }
    tracing::info!(data, "index open");
    if let Some((part, upstream)) = broker.upstream() {
        let what = match part {
            Part::Edge => "the site of an upstream is served: its channels are published there",
            Part::Gateway => "a gateway: all of it is the upstream's",
        };
        tracing::info!(upstream, "{what}");
        broker.warnings().for_each(|warning| tracing::warn!("{warning}"));
    }
    match (broker.is_guarded(), open) {
        (true, _) => tracing::info!("clients log in as the users of `mpypi-broker user list`"),
        (false, true) => {
            tracing::warn!("--unsafe-open: everyone who can reach this broker may read and publish");
        }
        (false, false) => {}
    }
    tokio::spawn(async move { gate.report().await });
    let stop = shutdown.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        stop.cancel();
    });
    Ok(broker.run(shutdown).await?)
}

/// What to do about an error, if we know.
pub(crate) fn hint(error: &anyhow::Error) -> Option<String> {
    if let Some(error) = error.downcast_ref::<SettingsError>() {
        return error.hint();
    }
    match error.downcast_ref::<AuthorityError>() {
        Some(AuthorityError::Exists(_)) => {
            return Some("`--force` writes over it, but never over a certificate authority".to_owned());
        }
        Some(AuthorityError::Missing(_)) => {
            return Some(
                "`mpypi-broker init --tls` makes what is needed; `--data` says where it is".to_owned(),
            );
        }
        _ => {}
    }
    match error.downcast_ref::<ServeError>()? {
        ServeError::Listen { source, endpoint } if source.kind() == std::io::ErrorKind::AddrInUse => {
            let free = Endpoint { address: SocketAddr::new(endpoint.address.ip(), 0), ..*endpoint };
            Some(format!("is a broker running already? `--listen {free}` picks a free port"))
        }
        ServeError::Open(_) | ServeError::OpenHttp(_) => {
            let hint = "add a user with `mpypi-broker user add`, use a loopback address, require certificates of clients, \
                        or `--unsafe-open` in a network you trust";
            Some(hint.to_owned())
        }
        ServeError::NoCertificate(_) | ServeError::NoHttpCertificate(_) => {
            Some("give `--tls-cert` and `--tls-key`, or make both with `mpypi-broker init --tls`".to_owned())
        }
        ServeError::Tls(TlsError::NoAuthority) => Some("name its file with `--tls-client-ca`".to_owned()),
        ServeError::ListenHttp { source, .. } if source.kind() == std::io::ErrorKind::AddrInUse => {
            Some("is a broker running already? port 0 picks a free port".to_owned())
        }
        ServeError::Index(IndexError::InUse { .. }) => {
            Some("give each broker a folder of its own with `--data`".to_owned())
        }
        _ => None,
    }
}
