//! What people see while a fleet runs, on standard error: bars on a terminal, plain lines elsewhere.

use std::{
    io::{Write, stderr},
    time::Duration,
};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use mpypi_protocol::{Digest, NodeId, node::Phase};

use super::tally::{NodeResult, Outcome, PHASES, Record, Sample, Tally, label};
use crate::{limits::TOLD_ONE_BY_ONE, update::Report, weather::Blow};

/// Shows what nodes do.
pub trait View: Send {
    /// A node's update went on.
    fn report(&mut self, node: &NodeResult, index: usize, report: &Report);
    /// A node has something to say.
    fn log(&mut self, node: &NodeResult, line: &str);
    /// Something befell a node.
    fn blow(&mut self, node: &NodeResult, blow: Blow) {
        self.log(
            node,
            match blow {
                Blow::PowerCut => "power cut",
                Blow::Crash => "the application crashes",
                Blow::Sleep => "goes to sleep",
            },
        );
    }
    /// A node that is looked at alone took a step.
    fn trace(&mut self, now: Duration, node: &NodeResult, line: &str) {
        self.log(node, &format!("{:8.3} s  {line}", now.as_secs_f64()));
    }
    /// How the fleet stands now.
    fn sample(&mut self, tally: &Tally, sample: &Sample);
    /// Nothing more comes.
    fn end(&mut self) {}
}

/// One line for each change of phase; for a large fleet one for each change of the sums.
#[derive(Debug)]
pub struct Lines {
    width: usize,
    last: Vec<Option<(Digest, Phase)>>,
    sums: Option<String>,
}

/// One bar for each node; for a larger fleet one for each phase, with throughput, errors and who is last.
#[derive(Debug)]
pub struct Bars {
    screen: MultiProgress,
    /// One for each node of a small fleet.
    bars: Vec<ProgressBar>,
    board: Option<Sums>,
    lines: Lines,
}

/// The screen of a large fleet.
#[derive(Debug)]
struct Sums {
    applied: ProgressBar,
    /// In the order of [`SHOWN`].
    phases: [ProgressBar; SHOWN.len()],
    traffic: ProgressBar,
    straggler: ProgressBar,
    errors: ProgressBar,
}

/// The phases that a large fleet's screen shows; who is idle has applied something, or nothing yet.
const SHOWN: [Phase; 7] = [
    Phase::Downloading,
    Phase::Verifying,
    Phase::Installing,
    Phase::Restarting,
    Phase::Confirming,
    Phase::Failed,
    Phase::RolledBack,
];

/// How many reasons of errors that screen names.
const REASONS: usize = 4;

impl Lines {
    /// For these nodes.
    #[must_use]
    pub fn new<'a>(nodes: impl Iterator<Item = &'a NodeId>) -> Lines {
        let widths: Vec<_> = nodes.map(|node| node.as_str().chars().count()).collect();
        Lines { width: widths.iter().copied().max().unwrap_or(0), last: vec![None; widths.len()], sums: None }
    }

    fn is_large(&self) -> bool {
        self.last.len() > TOLD_ONE_BY_ONE
    }

    fn line(&mut self, node: &NodeResult, index: usize, report: &Report) -> Option<String> {
        let list = report.list?;
        let phase = report.state.phase;
        if self.last[index].replace((list, phase)) == Some((list, phase)) {
            return None;
        }
        let record = node.records.iter().find(|record| record.list == list)?;
        let release = label(report.state.sequence, &list);
        let name = node.node.as_str();
        Some(format!("{name:width$}  release {release}  {}", describe(report, record), width = self.width))
    }
}

impl View for Lines {
    fn report(&mut self, node: &NodeResult, index: usize, report: &Report) {
        if !self.is_large()
            && let Some(line) = self.line(node, index, report)
        {
            say(&line);
        }
    }

    fn sample(&mut self, tally: &Tally, sample: &Sample) {
        let sums = sums(tally, sample);
        if self.is_large() && self.sums.as_ref() != Some(&sums) {
            say(&format!("{:6.1} s  {sums}", sample.at.as_secs_f64()));
            self.sums = Some(sums);
        }
    }

    fn log(&mut self, node: &NodeResult, line: &str) {
        if self.is_large() {
            return;
        }
        say(&format!("{:width$}  {line}", node.node.as_str(), width = self.width));
    }
}

impl Bars {
    /// For these nodes.
    #[must_use]
    pub fn new<'a>(nodes: impl Iterator<Item = &'a NodeId> + Clone) -> Bars {
        let lines = Lines::new(nodes.clone());
        let screen = MultiProgress::new();
        let mut bars = Vec::new();
        let mut board = None;
        if lines.is_large() {
            board = Some(Sums::new(&screen, lines.last.len() as u64));
        } else {
            for node in nodes {
                let bar = screen.add(ProgressBar::new(0));
                // With what it says of an applied release it fits 80 columns.
                bar.set_style(style("{prefix}  [{bar:12}] {bytes:>10}  {wide_msg}"));
                bar.set_prefix(format!("{:width$}", node.as_str(), width = lines.width));
                bar.set_message("waiting");
                bars.push(bar);
            }
        }
        Bars { screen, bars, board, lines }
    }
}

fn style(template: &str) -> ProgressStyle {
    let style = ProgressStyle::with_template(template);
    style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> ")
}

impl Sums {
    fn new(screen: &MultiProgress, nodes: u64) -> Sums {
        let add = |length: u64, template: &str| {
            let bar = screen.add(ProgressBar::new(length));
            bar.set_style(style(template));
            bar
        };
        let applied = add(nodes, "{prefix:<11} [{bar:40.green}] {pos:>6} of {len}  {elapsed}");
        applied.set_prefix("applied");
        let phases = SHOWN.map(|phase| {
            let bar = add(
                nodes,
                match phase {
                    Phase::Failed | Phase::RolledBack => "{prefix:<11} [{bar:40.red}] {pos:>6}",
                    _ => "{prefix:<11} [{bar:40.cyan}] {pos:>6}",
                },
            );
            bar.set_prefix(phase.to_string());
            bar
        });
        let [traffic, straggler, errors] = ["traffic", "last", "errors"].map(|name| {
            let line = add(0, "{prefix:<11} {wide_msg}");
            line.set_prefix(name);
            line.set_message("-");
            line
        });
        Sums { applied, phases, traffic, straggler, errors }
    }

    fn show(&self, tally: &Tally, sample: &Sample) {
        self.applied.set_position(sample.newest as u64);
        for (bar, shown) in self.phases.iter().zip(SHOWN) {
            let place = PHASES.iter().position(|phase| *phase == shown).unwrap_or_default();
            bar.set_position(sample.standing.phases[place] as u64);
        }
        let standing = &sample.standing;
        self.traffic.set_message(format!(
            "{:.1} MB/s, {:.1} MB in all, {:.1} MB at the sockets; {} connected, {} tries again",
            tally.throughput() / 1e6,
            standing.bytes as f64 / 1e6,
            standing.wire as f64 / 1e6,
            standing.online,
            standing.retries
        ));
        self.straggler.set_message(straggler(tally, sample).unwrap_or_else(|| "-".to_owned()));
        let errors: Vec<_> =
            tally.errors().iter().take(REASONS).map(|(error, count)| format!("{error} {count}")).collect();
        self.errors.set_message(if errors.is_empty() { "-".to_owned() } else { errors.join(", ") });
    }

    fn lines(&self) -> impl Iterator<Item = &ProgressBar> {
        [&self.applied].into_iter().chain(&self.phases).chain([&self.traffic, &self.straggler, &self.errors])
    }
}

impl View for Bars {
    fn report(&mut self, node: &NodeResult, index: usize, report: &Report) {
        if let Some(bar) = self.bars.get(index) {
            bar.set_length(report.state.total);
            bar.set_position(report.state.done);
            if let Some(record) = report.list.and_then(|list| node.records.iter().find(|r| r.list == list)) {
                let release = label(report.state.sequence, &record.list);
                bar.set_message(format!("release {release}  {}", describe(report, record)));
            }
        }
    }

    fn sample(&mut self, tally: &Tally, sample: &Sample) {
        if let Some(board) = &self.board {
            board.show(tally, sample);
        }
    }

    fn log(&mut self, node: &NodeResult, line: &str) {
        if self.lines.is_large() {
            return;
        }
        // Lost lines of a terminal are nothing to fail for.
        let _ =
            self.screen.println(format!("{:width$}  {line}", node.node.as_str(), width = self.lines.width));
    }

    fn end(&mut self) {
        for bar in self.bars.iter().chain(self.board.iter().flat_map(Sums::lines)) {
            bar.abandon();
        }
    }
}

/// How many nodes are in which phase, what arrived, what went wrong and who is last, in a line.
fn sums(tally: &Tally, sample: &Sample) -> String {
    let mut parts = vec![format!("applied {}", sample.newest)];
    for (phase, count) in PHASES.iter().zip(sample.standing.phases) {
        if count > 0 && *phase != Phase::Idle {
            parts.push(format!("{phase} {count}"));
        }
    }
    let mut line = format!("{}  {:.1} MB", parts.join(", "), sample.standing.bytes as f64 / 1e6);
    if let Some((error, count)) = tally.errors().first() {
        line += &format!("  {error} {count}");
    }
    if let Some(straggler) = straggler(tally, sample) {
        line += &format!("  last: {straggler}");
    }
    line
}

/// Who is under way for longest, in what and how long.
fn straggler(tally: &Tally, sample: &Sample) -> Option<String> {
    let (node, phase, since) = tally.straggler()?;
    Some(format!("{node}, {phase} for {:.0} s", sample.at.saturating_sub(since).as_secs_f64()))
}

/// Writes a line to standard error. If nobody reads it any more (`mpypi-agent fleet 2>&1 | head`), the fleet goes
/// on.
fn say(line: &str) {
    let _ = writeln!(stderr(), "{line}");
}

/// What a node does with a release, in a few words.
fn describe(report: &Report, record: &Record) -> String {
    let state = &report.state;
    match (state.phase, &record.outcome) {
        (Phase::Idle, Outcome::Applied) => match record.time() {
            Some(time) => format!("applied, {} B in {:.2} s", record.bytes, time.as_secs_f64()),
            None => "applied".to_owned(),
        },
        (Phase::Downloading, _) => format!("downloading {} of {} B", state.done, state.total),
        (Phase::Failed | Phase::RolledBack, _) => {
            format!("{}: {}", state.phase, state.error.as_deref().unwrap_or_default())
        }
        (phase, _) => phase.to_string(),
    }
}
