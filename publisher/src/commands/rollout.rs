//! `mpypi rollout`

use std::{
    io::{self, IsTerminal, Write, stderr, stdin, stdout},
    path::PathBuf,
};

use clap::Subcommand;
use indicatif::{ProgressBar, ProgressStyle};
use jiff::Timestamp;
use mpypi_protocol::{
    ChannelName, KeyId, Query,
    rollout::{Percent, Window},
};
use serde_json::{Value, json};

use super::{Stopped, interrupted, places, print, reading};
use crate::{
    cli::{CutArgs, KeyArgs, PlaceArgs, SignArgs},
    progress::{Lines, Progress},
    publish::Harm,
    report::{count, painted, say, wants_color},
    rollout::{
        Order, Policy, Record, Status,
        start::{Start, StartError, Started, Target, Unheld, start},
        steer::{Event, Observer, Standings, Steering, look, steer},
    },
    settings::{
        RolloutSettings, Settings, parse_jitter, parse_not_before, parse_percent, parse_seconds, parse_steps,
    },
};

const EXAMPLES: &str = "\
Publishes a folder, or what the channel has, for few of its nodes first and for more at each step. Which, each node \
works out itself from the signed list: no server decides, and any broker will do. The next step follows when enough nodes \
run the release; when too many fail, take it back or fall silent, the rollout pauses by itself, and with \
--rollback-on-failure the release before is put back. Killed anywhere, it goes on when the same command is run again, on \
any machine.

The same may stand in channel.toml:
  [rollout]
  steps = \"1%,10%,50%,100%\"
  wait = \"10m\"
  max-failures = \"2%\"
  rollback-on-failure = true

Queries (--only) compare `node`, `runtime`, `channel`, `version` and `sequence` of what runs, `agent`, `firmware` and \
`label.<name>` by = != < <= > >= and ~ (a pattern with * and ?), joined by and, or, not and parentheses.

Examples:
  mpypi rollout channels/dev
  mpypi rollout channels/dev --steps 1%,10%,50%,100% --wait 10m --max-failures 2% --min-success 95%
  mpypi rollout dev --only 'runtime ~ \"*esp32*\" and version < 1.3' --window 22:00-04:00 --jitter 10m
                                     what channel `dev` has, to those that have less, at night
  mpypi rollout status dev
  mpypi rollout pause dev            nobody else gets it
  mpypi rollout resume dev           goes on, whatever failed so far
  mpypi rollout abort dev            puts the release before back

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 the rollout did not succeed.";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES, args_conflicts_with_subcommands = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    begin: Begin,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show how a channel's rollout stands
    Status(Watch),
    /// Stop a rollout: nobody else gets the release
    Pause(Watch),
    /// Go on with a rollout that is paused, whatever failed so far
    Resume(Watch),
    /// End a rollout and put the release before back
    Abort(Watch),
}

#[derive(Debug, clap::Args)]
struct Watch {
    /// The channel
    channel: ChannelName,
    #[command(flatten)]
    place: PlaceArgs,
    #[command(flatten)]
    sign: SignArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
struct Begin {
    /// The channel's folder; or the channel, to roll out what it has
    #[arg(value_name = "FOLDER|CHANNEL")]
    target: Option<PathBuf>,
    #[command(flatten)]
    place: PlaceArgs,
    #[command(flatten)]
    cut: CutArgs,
    /// The channel's name [default: `name` in channel.toml, or the folder's name]
    #[arg(long, value_name = "NAME")]
    channel: Option<ChannelName>,
    /// How many of the nodes at each step [default: 1%,10%,50%,100%]
    #[arg(long, value_parser = Steps::read)]
    steps: Option<Steps>,
    /// How long each step takes at least [default: 10m]
    #[arg(long, value_name = "TIME", value_parser = parse_seconds)]
    wait: Option<u64>,
    /// Give a step up that did not get to --min-success in this time [default: three times --wait]
    #[arg(long, value_name = "TIME", value_parser = parse_seconds)]
    patience: Option<u64>,
    /// Stop when more of a step's nodes failed, took the release back or fell silent [default: 2%]
    #[arg(long, value_name = "PERCENT", value_parser = parse_percent)]
    max_failures: Option<Percent>,
    /// Go on when so many of a step's nodes run the release [default: 95%]
    #[arg(long, value_name = "PERCENT", value_parser = parse_percent)]
    min_success: Option<Percent>,
    /// When it stops, put the release before back
    #[arg(long)]
    rollback_on_failure: bool,
    /// Only for nodes of which this holds, as 'label.room = kitchen'
    #[arg(long, value_name = "QUERY")]
    only: Option<Query>,
    /// Not before this time, as 2026-12-01T22:00:00Z
    #[arg(long, value_name = "TIME", value_parser = parse_not_before)]
    not_before: Option<Timestamp>,
    /// Only at this time of day, as 22:00-04:00: UTC, or local where a node says how far it is ahead
    #[arg(long)]
    window: Option<Window>,
    /// Each node waits for a time of its own, up to this
    #[arg(long, value_name = "TIME", value_parser = parse_jitter)]
    jitter: Option<u32>,
    /// Each node waits for an order: `[{\"type\":\"install\"}]` on its `cmd` topic
    #[arg(long)]
    optional: bool,
    /// Publish even what would leave devices that run Mpy-BLOX waiting or starting again for ever
    #[arg(long)]
    force: bool,
    /// The key that signs lists [default: `key` in channel.toml, then one of the folder that may]
    #[arg(long = "sign-with", value_name = "KEY")]
    signer: Option<KeyId>,
    #[command(flatten)]
    keys: KeyArgs,
    /// Start although this broker cannot hold back devices that run Mpy-BLOX
    #[arg(long)]
    yes: bool,
    /// Print the outcome as one JSON object
    #[arg(long)]
    json: bool,
}

/// Several percentages in one argument.
#[derive(Debug, Clone)]
struct Steps(Vec<Percent>);

impl Steps {
    fn read(text: &str) -> Result<Steps, String> {
        parse_steps(text).map(Steps)
    }
}

/// The rollout is over, and not every step went well.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RolloutFailure {
    /// It stands so.
    #[error("the rollout of version {version} on channel `{channel}` is {status}{}", why(reason.as_deref()))]
    NotDone {
        /// The channel.
        channel: ChannelName,
        /// What was rolled out.
        version: String,
        /// How it stands.
        status: Status,
        /// Why.
        reason: Option<String>,
    },
    /// The policy makes no sense.
    #[error("this rollout makes no sense: {0}")]
    Policy(&'static str),
}

fn why(reason: Option<&str>) -> String {
    reason.map(|reason| format!(": {reason}")).unwrap_or_default()
}

impl RolloutFailure {
    /// What to do about it.
    pub(crate) fn hint(&self) -> Option<String> {
        match self {
            RolloutFailure::NotDone { channel, status: Status::Paused, .. } => Some(format!(
                "`mpypi rollout resume {channel}` goes on, `mpypi rollout abort {channel}` puts the release before back"
            )),
            _ => None,
        }
    }
}

pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    match args.command {
        Some(Command::Status(watch)) => show(watch).await,
        Some(Command::Pause(watch)) => order(watch, Order::Pause).await,
        Some(Command::Resume(watch)) => order(watch, Order::Resume).await,
        Some(Command::Abort(watch)) => order(watch, Order::Abort).await,
        None => roll_out(args.begin).await,
    }
}

async fn roll_out(begin: Begin) -> anyhow::Result<()> {
    let Some(target) = begin.target else {
        let error = clap::error::ErrorKind::MissingRequiredArgument;
        clap::Command::new("mpypi rollout").error(error, "name a folder, a channel, or what to do").exit()
    };
    let target = match ChannelName::new(target.to_string_lossy()) {
        Ok(channel) if !target.is_dir() => Target::Present(channel),
        _ => Target::Folder(target),
    };
    let mut settings = RolloutSettings {
        steps: begin.steps.map(|steps| steps.0),
        wait: begin.wait,
        patience: begin.patience,
        max_failures: begin.max_failures,
        min_success: begin.min_success,
        rollback_on_failure: begin.rollback_on_failure.then_some(true),
        only: begin.only,
        not_before: begin.not_before,
        window: begin.window,
        jitter: begin.jitter,
        optional: begin.optional.then_some(true),
    };
    if let Target::Folder(folder) = &target {
        settings = settings.or(Settings::load(folder)?.rollout);
    }
    let policy = settings.policy().map_err(RolloutFailure::Policy)?;
    let brokers = begin.cut.applied(places(begin.place)?);
    let signer = match &target {
        Target::Folder(folder) => begin.signer.or(Settings::load(folder)?.key),
        Target::Present(_) => begin.signer,
    };
    let signing = begin.keys.signing(signer);
    let mut wanted = Start {
        brokers: brokers.clone(),
        target,
        channel: begin.channel,
        policy,
        harm: if begin.force { Harm::Forced } else { Harm::Refused },
        unheld: if begin.yes { Unheld::Accepted } else { Unheld::Refused },
        signing: signing.clone(),
    };
    let mut progress = Progress::new(if begin.json { Lines::Hidden } else { Lines::Shown });
    let started = tokio::select! {
        started = async {
            match start(&wanted, &mut progress).await {
                Err(StartError::CannotHold { nodes, .. }) if agrees(nodes)? => {
                    wanted.unheld = Unheld::Accepted;
                    Ok::<_, anyhow::Error>(start(&wanted, &mut progress).await?)
                }
                started => Ok(started?),
            }
        } => Some(started),
        stop = interrupted() => stop.map(|()| None)?,
    };
    progress.clear();
    let Some(started) = started else { return Err(Stopped::BeforeTheList.into()) };
    let Started { channel, begin: record } = started?;
    let standings =
        steered(Steering { brokers, channel, begin: record, order: None, signing }, begin.json).await?;
    finish(standings, begin.json, &[Status::Done])
}

/// Asks whether to go on although nodes cannot be held back; `false` where nobody is there to answer.
fn agrees(nodes: usize) -> io::Result<bool> {
    if !stdin().is_terminal() || !stderr().is_terminal() {
        return Ok(false);
    }
    let nodes = count(nodes, "node");
    write!(
        stderr(),
        "{nodes} with Mpy-BLOX cannot be held back by this broker and will get the release at once. Go on? [y/N] "
    )?;
    let mut answer = String::new();
    stdin().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

async fn order(watch: Watch, order: Order) -> anyhow::Result<()> {
    let brokers = places(watch.place)?;
    let signing = watch.sign.signing();
    let steering = Steering { brokers, channel: watch.channel, begin: None, order: Some(order), signing };
    let standings = steered(steering, watch.json).await?;
    let wanted: &[Status] = match order {
        Order::Pause => &[Status::Paused],
        Order::Resume => &[Status::Done],
        Order::Abort => &[Status::RolledBack],
    };
    finish(standings, watch.json, wanted)
}

async fn show(watch: Watch) -> anyhow::Result<()> {
    let brokers = places(watch.place)?;
    let looked = reading(look(&brokers, &watch.channel)).await?;
    let (standings, _) = looked;
    match watch.json {
        true => print(&format!("{}\n", to_json(&standings))),
        false => print(&format!("{}\n", to_text(&standings, wants_color(&stdout())))),
    }
}

async fn steered(steering: Steering, json: bool) -> anyhow::Result<Standings> {
    let mut screen = Screen::new(if json { Lines::Hidden } else { Lines::Shown });
    let steered = tokio::select! {
        steered = steer(&steering, &mut screen) => Some(steered),
        stop = interrupted() => stop.map(|()| None)?,
    };
    screen.clear();
    match steered {
        Some(steered) => Ok(steered?),
        None => Err(Stopped::Steering.into()),
    }
}

fn finish(standings: Standings, json: bool, wanted: &[Status]) -> anyhow::Result<()> {
    match json {
        true => print(&format!("{}\n", to_json(&standings)))?,
        false => print(&format!("{}\n", to_text(&standings, wants_color(&stdout()))))?,
    }
    let Record { channel, version, status, reason, .. } = standings.record;
    match wanted.contains(&status) {
        true => Ok(()),
        false => Err(RolloutFailure::NotDone { channel, version, status, reason }.into()),
    }
}

fn to_json(standings: &Standings) -> Value {
    let record = &standings.record;
    json!({
        "channel": record.channel,
        "rollout": record.id,
        "version": record.version,
        "status": record.status,
        "reason": record.reason,
        "step": record.step + 1,
        "steps": record.policy.steps,
        "percent": standings.percent,
        "sequence": standings.sequence,
        "first": record.first,
        "base": record.base,
        "steered-by": standings.steered_by,
        "nodes": standings.counts,
    })
}

/// The width of a bar of nodes, in characters.
const BAR: usize = 30;

fn to_text(standings: &Standings, color: bool) -> String {
    let record = &standings.record;
    let (status, code) = match record.status {
        Status::Done => ("done", "32;1"),
        Status::Running => ("running", "36;1"),
        Status::Paused => ("paused", "33;1"),
        Status::RollingBack => ("rolling back", "33;1"),
        Status::RolledBack => ("rolled back", "31;1"),
        Status::Superseded => ("superseded", "33;1"),
    };
    let mut text =
        format!("{}: version {}, {}", record.channel, record.version, painted(status, code, color));
    text += &why(record.reason.as_deref());
    for (at, percent) in record.policy.steps.iter().enumerate() {
        let mark = match (at.cmp(&record.step), record.status) {
            (std::cmp::Ordering::Less, _) | (_, Status::Done) => "done",
            (std::cmp::Ordering::Equal, _) => "here",
            (std::cmp::Ordering::Greater, _) => "",
        };
        text += &format!("\n  step {} of {}: {percent}% {mark}", at + 1, record.policy.steps.len());
        text = text.trim_end().to_owned();
    }
    text + &format!("\n  {} {}", bar(standings), tally(standings))
}

fn bar(standings: &Standings) -> String {
    let counts = &standings.counts;
    let bad = counts.failed + counts.rolled_back + counts.silent;
    let cells = |part: usize| (part * BAR).div_ceil(counts.nodes.max(1)).min(BAR);
    let bad = cells(bad);
    let good = cells(counts.succeeded).min(BAR - bad);
    format!("[{}{}{}]", "=".repeat(good), "!".repeat(bad), " ".repeat(BAR - good - bad))
}

fn tally(standings: &Standings) -> String {
    let counts = &standings.counts;
    let mut text = format!("{} of {}", counts.succeeded, count(counts.nodes, "node"));
    for (number, what) in [
        (counts.pending, "under way"),
        (counts.waiting, "waiting"),
        (counts.failed, "failed"),
        (counts.rolled_back, "rolled back"),
        (counts.silent, "silent"),
        (counts.absent, "absent"),
    ] {
        if number > 0 {
            text += &format!(", {number} {what}");
        }
    }
    text
}

/// Shows a rollout while it goes on: a bar on a terminal, a line for each change elsewhere.
struct Screen {
    lines: Lines,
    bar: Option<ProgressBar>,
    told: String,
}

impl Screen {
    fn new(lines: Lines) -> Screen {
        let bar = (lines == Lines::Shown && stderr().is_terminal()).then(|| {
            let style = ProgressStyle::with_template("{msg}");
            ProgressBar::new_spinner().with_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()))
        });
        Screen { lines, bar, told: String::new() }
    }

    fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    fn line(&self, line: &str) {
        match (&self.bar, self.lines) {
            (_, Lines::Hidden) => {}
            (Some(bar), _) => bar.suspend(|| say(line)),
            (None, _) => say(line),
        }
    }
}

impl Observer for Screen {
    fn event(&mut self, event: Event<'_>) {
        match event {
            Event::Looked(standings) => {
                let record = &standings.record;
                let Policy { steps, .. } = &record.policy;
                let by = standings.steered_by.as_ref();
                let by = by.map(|by| format!(", steered by {by}")).unwrap_or_default();
                let place = format!("step {} of {} ({}%)", record.step + 1, steps.len(), record.percent());
                let now = format!("{place}, {}{by}: {}", record.status, tally(standings));
                if now != self.told {
                    match &self.bar {
                        Some(shown) => {
                            shown.set_message(format!("{place} {} {}{by}", bar(standings), tally(standings)));
                        }
                        None => self.line(&now),
                    }
                    self.told = now;
                }
            }
            Event::Published { sequence, percent: Some(percent) } => {
                self.line(&format!("published list {sequence}, for {percent}% of the nodes"));
            }
            Event::Published { sequence, percent: None } => {
                self.line(&format!("published list {sequence}, with the release before"));
            }
            Event::Recorded(record) => {
                if let Some(reason) = &record.reason {
                    self.line(&format!("{}: {reason}", record.status));
                }
            }
            Event::Behind(verdict) => {
                self.line(&format!("{} {verdict}", painted("warning:", "33;1", wants_color(&stderr()))));
            }
            Event::Lost { error, pause } => {
                let label = painted("warning:", "33;1", wants_color(&stderr()));
                self.line(&format!("{label} {error}; trying again in {:.1} s", pause.as_secs_f64()));
            }
        }
    }
}
