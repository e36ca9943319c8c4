//! The whole command line, on a page.

mod face;
mod fleet;
mod run;

use std::{
    collections::BTreeMap,
    io::{self, IsTerminal, Write},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use mpypi_agent_sim::face::http::Faces;
use mpypi_agent_sim::fleet::{Bars, FleetOptions, Lines, Summary, View};
use mpypi_agent_sim::{limits, update::Timing};
use mpypi_client::{BrokerArgs, Brokers, BrokersError, Endpoint, args::parse_time};
use mpypi_protocol::{Root, Trust, root::SignedRoot, signed};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// A simulated device that follows a channel of mpypi, or a fleet of them.
///
/// It does everything a real device does: subscribes to the channel's update list on an MQTT broker, fetches the
/// packages it lacks, verifies them, puts them in place such that a power cut at any moment leaves the old or the
/// new release, confirms the new one or rolls it back, and says on `mpypi/nodes/<node>/state` where it stands.
/// Only the application is absent: the restart is simulated, and a new release confirms itself.
#[derive(Debug, Parser)]
#[command(name = "mpypi-agent", version, max_term_width = 100, after_long_help = AFTER)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run one device in a directory.
    Run(run::Args),
    /// Run many devices in one process.
    Fleet(fleet::Args),
}

/// Where the broker is, and what comes out.
#[derive(Debug, clap::Args)]
struct Common {
    #[command(flatten)]
    broker: BrokerArgs,
    /// The channel to follow.
    #[arg(long, default_value = "dev")]
    channel: mpypi_protocol::ChannelName,
    /// Believe only lists that this root, or one that follows from it, lets somebody sign: a file that
    /// `mpypi keys export` wrote.
    #[arg(long, value_name = "FILE")]
    pin: Option<PathBuf>,
    /// Believe only lists that one of these keys signed: a JSON object of moduli in hexadecimal, by name, as
    /// `mpypi keys export --plain` writes.
    #[arg(long, value_name = "FILE", conflicts_with = "pin")]
    keys: Option<PathBuf>,
    /// How long a new release must run before it is confirmed, as 500ms or 2s.
    #[arg(long, value_name = "TIME", default_value = "500ms", value_parser = parse_time)]
    confirm_after: Duration,
    /// How often the channel's list is asked for although none came, as 5m or 1h [default: 1h, and 5m with several brokers]
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    check: Option<Duration>,
    /// Print the result as JSON on standard output.
    #[arg(long)]
    json: bool,
}

const AFTER: &str = "\
Examples:
  mpypi-agent run --root /tmp/node --node kitchen
      follow channel `dev` of the broker on this machine until Ctrl-C
  mpypi-agent run --channel stable --once --json
      apply one release, print the result, exit
  mpypi-agent run --broker mqtts://kitchen:secret@hub.local --ca ca.pem
      over TLS, with a broker whose certificate a private CA made
  mpypi-agent fleet --nodes 50 --releases 1 --for 60s
      fifty devices; ends when each has applied or refused one release

Progress goes to standard error, results to standard output.

Exit codes:
  0  every device applied every release it saw
  1  failed to run: no broker, a directory that cannot be used
  2  wrong usage
  3  some device did not apply a release";

/// A message to people, and what they can do about it.
#[derive(Debug)]
pub(crate) struct Failure {
    error: anyhow::Error,
    hint: Option<String>,
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        let error = error.into();
        let hint = error.downcast_ref().and_then(BrokersError::hint).map(str::to_owned);
        Failure { error, hint }
    }
}

/// Runs what the command line says.
pub(crate) fn run(cli: Cli) -> ExitCode {
    let done = match cli.command {
        Command::Run(args) => run::run(args),
        Command::Fleet(args) => fleet::run(args),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(3),
        Err(Failure { error, hint }) => {
            let hint = hint.map(|hint| format!("hint: {hint}\n")).unwrap_or_default();
            // Nobody is left to tell if this fails.
            let _ = write!(io::stderr(), "error: {error:#}\n{hint}");
            ExitCode::FAILURE
        }
    }
}

/// Writes a result to standard output. A reader that went away (`mpypi-agent fleet | head`) is no error.
fn print(result: &str) -> io::Result<()> {
    match writeln!(io::stdout(), "{result}") {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error),
        _ => Ok(()),
    }
}

/// The brokers of the command line. Says what people should know about the way there.
fn brokers(args: BrokerArgs) -> Result<Brokers, Failure> {
    let brokers = args.brokers()?;
    for warning in brokers.iter().flat_map(Endpoint::warnings) {
        // Nobody is left to tell if this fails.
        let _ = writeln!(io::stderr(), "warning: {warning}");
    }
    Ok(brokers)
}

impl Common {
    /// The brokers, and the times that devices go by there.
    fn brokers(&self) -> Result<(Brokers, Timing), Failure> {
        let brokers = brokers(self.broker.clone())?;
        let usual = if brokers.are_several() { limits::CHECK_SEVERAL } else { limits::CHECK };
        let check = self.check.unwrap_or(usual);
        Ok((brokers, Timing { confirm_after: Some(self.confirm_after), check, ..Timing::default() }))
    }

    /// Whose lists the devices believe.
    fn trust(&self) -> anyhow::Result<Trust> {
        let read =
            |path: &PathBuf| std::fs::read(path).with_context(|| format!("cannot read `{}`", path.display()));
        match (&self.pin, &self.keys) {
            (Some(path), _) => {
                let root = SignedRoot::parse(&read(path)?).and_then(Root::pin);
                let root = root.with_context(|| format!("`{}` is no root to pin", path.display()))?;
                Ok(Trust::Root(root.into()))
            }
            (None, Some(path)) => {
                let what = || format!("`{}` is no file of keys", path.display());
                let keys: BTreeMap<String, String> =
                    serde_json::from_slice(&read(path)?).with_context(what)?;
                Ok(Trust::Keys(signed::plain_keys(keys).with_context(what)?.into()))
            }
            (None, None) => Ok(Trust::Anyone),
        }
    }
}

/// Runs a fleet until it is done or a signal comes; shows its progress, and meanwhile the faces of a device.
fn run_fleet(options: FleetOptions, faces: Option<Faces>) -> Result<Summary, Failure> {
    let names = options.members.iter().map(|member| &member.node);
    let view: Box<dyn View> = match io::stderr().is_terminal() {
        true => Box::new(Bars::new(names)),
        false => Box::new(Lines::new(names)),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let summary = runtime.block_on(async {
        let stop = CancellationToken::new();
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let on_signal = stop.clone();
        tokio::spawn(async move {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            on_signal.cancel();
        });
        let faces = faces.map(|faces| tokio::spawn(faces.serve(stop.clone())));
        let summary = mpypi_agent_sim::fleet::run(options, view, stop.clone()).await;
        stop.cancel();
        if let Some(faces) = faces {
            faces.await??;
        }
        Ok::<_, Failure>(summary?)
    })?;
    match &summary.trouble {
        Some(trouble) if !summary.ever_connected => {
            Err(Failure { error: anyhow::anyhow!("{}", trouble.error), hint: Some(trouble.hint.clone()) })
        }
        _ => Ok(summary),
    }
}
