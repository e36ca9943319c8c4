//! What people see while a fleet runs, on standard error: bars on a terminal, plain lines elsewhere.

use std::io::{Write, stderr};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use mpypi_protocol::{Digest, NodeId, node::Phase};

use super::tally::{NodeResult, Outcome, Record, label};
use crate::update::Report;

/// Shows what nodes do.
pub trait View: Send {
    /// A node's update went on.
    fn report(&mut self, node: &NodeResult, index: usize, report: &Report);
    /// A node has something to say.
    fn log(&mut self, node: &NodeResult, line: &str);
    /// Nothing more comes.
    fn end(&mut self) {}
}

/// One line for each change of phase.
#[derive(Debug)]
pub struct Lines {
    width: usize,
    last: Vec<Option<(Digest, Phase)>>,
}

/// One bar for each node; for a larger fleet one bar for all.
#[derive(Debug)]
pub struct Bars {
    screen: MultiProgress,
    bars: Vec<ProgressBar>,
    total: Option<ProgressBar>,
    lines: Lines,
}

/// Most nodes with a bar of their own.
const BARS: usize = 40;

impl Lines {
    /// For these nodes.
    #[must_use]
    pub fn new<'a>(nodes: impl Iterator<Item = &'a NodeId>) -> Lines {
        let widths: Vec<_> = nodes.map(|node| node.as_str().chars().count()).collect();
        Lines { width: widths.iter().copied().max().unwrap_or(0), last: vec![None; widths.len()] }
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
        if let Some(line) = self.line(node, index, report) {
            say(&line);
        }
    }

    fn log(&mut self, node: &NodeResult, line: &str) {
        say(&format!("{:width$}  {line}", node.node.as_str(), width = self.width));
    }
}

impl Bars {
    /// For these nodes.
    #[must_use]
    pub fn new<'a>(nodes: impl Iterator<Item = &'a NodeId> + Clone) -> Bars {
        let lines = Lines::new(nodes.clone());
        let screen = MultiProgress::new();
        let style = |template: &str| {
            let style = ProgressStyle::with_template(template);
            style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> ")
        };
        let count = lines.last.len();
        let mut bars = Vec::new();
        let mut total = None;
        if count <= BARS {
            for node in nodes {
                let bar = screen.add(ProgressBar::new(0));
                // With what it says of an applied release it fits 80 columns.
                bar.set_style(style("{prefix}  [{bar:12}] {bytes:>10}  {wide_msg}"));
                bar.set_prefix(format!("{:width$}", node.as_str(), width = lines.width));
                bar.set_message("waiting");
                bars.push(bar);
            }
        } else {
            let bar = screen.add(ProgressBar::new(count as u64));
            bar.set_style(style("[{bar:40}] {pos} of {len} nodes at rest  {msg}"));
            total = Some(bar);
        }
        Bars { screen, bars, total, lines }
    }
}

impl View for Bars {
    fn report(&mut self, node: &NodeResult, index: usize, report: &Report) {
        let line = self.lines.line(node, index, report);
        if let Some(bar) = self.bars.get(index) {
            bar.set_length(report.state.total);
            bar.set_position(report.state.done);
            if let Some(record) = report.list.and_then(|list| node.records.iter().find(|r| r.list == list)) {
                let release = label(report.state.sequence, &record.list);
                bar.set_message(format!("release {release}  {}", describe(report, record)));
            }
        }
        if let (Some(total), Some(_)) = (&self.total, line) {
            let resting = |phase| matches!(phase, Phase::Idle | Phase::Failed | Phase::RolledBack);
            let count = self.lines.last.iter().flatten().filter(|(_, phase)| resting(*phase)).count();
            total.set_position(count as u64);
        }
    }

    fn log(&mut self, node: &NodeResult, line: &str) {
        // Lost lines of a terminal are nothing to fail for.
        let _ =
            self.screen.println(format!("{:width$}  {line}", node.node.as_str(), width = self.lines.width));
    }

    fn end(&mut self) {
        for bar in self.bars.iter().chain(&self.total) {
            bar.abandon();
        }
    }
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
