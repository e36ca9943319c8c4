//! `mpypi-broker serve`

use std::{io::Write, sync::Arc};

use mpypi_broker::{Access, Broker, Config, Limits, ServeError, index::IndexError};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::{cli::ServeArgs, log};

/// What a PUBLISH needs around its package, in bytes.
const PACKET_OVERHEAD: u64 = 64 * 1024;

pub(crate) fn run(args: ServeArgs) -> anyhow::Result<()> {
    let gate = log::to_stderr(args.log_json)?;
    let mut limits = Limits::default();
    let most = limits.packet as u64 - PACKET_OVERHEAD;
    anyhow::ensure!(args.max_package <= most, "--max-package is at most {most}, what fits into a packet");
    limits.package = args.max_package;
    match rlimit::increase_nofile_limit(u64::MAX) {
        Ok(files) => limits.fit_into(usize::try_from(files).unwrap_or(usize::MAX)),
        Err(error) => tracing::warn!(%error, "cannot raise the limit of open files: fewer clients may fit"),
    }
    let access = if args.unsafe_open { Access::UnsafeOpen } else { Access::Loopback };
    let config = Config { listen: args.listen, data: args.data, limits, access };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let outcome = runtime.block_on(serve(config, gate));
    // rumqttd's router has no way to stop: its thread ends with the process.
    runtime.shutdown_background();
    outcome
}

async fn serve(config: Config, gate: Arc<log::Gate>) -> anyhow::Result<()> {
    let shutdown = CancellationToken::new();
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let open = config.access == Access::UnsafeOpen;
    let data = config.data.display().to_string();
    let broker = Broker::bind(config).await?;
    // The first line is for programs: it tells the port. Whoever reads no further does not end the broker.
    let places: String =
        broker.addresses().iter().map(|address| format!("listening on mqtt://{address}\n")).collect();
    let mut out = std::io::stdout();
    if let Err(error) = out.write_all(places.as_bytes()).and_then(|()| out.flush()) {
        tracing::warn!(%error, "cannot say where the broker listens");
    }
    tracing::info!(data, "index open");
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
    match error.downcast_ref::<ServeError>()? {
        ServeError::Listen { source, address } if source.kind() == std::io::ErrorKind::AddrInUse => {
            Some(format!("is a broker running already? `--listen {}:0` picks a free port", address.ip()))
        }
        ServeError::Open(_) => {
            let hint = "add a user with `mpypi-broker user add`, use a loopback address, or `--unsafe-open` in a \
                        network you trust";
            Some(hint.to_owned())
        }
        ServeError::Index(IndexError::InUse { .. }) => {
            Some("give each broker a folder of its own with `--data`".to_owned())
        }
        _ => None,
    }
}
