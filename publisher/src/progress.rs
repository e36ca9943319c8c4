//! Progress on stderr: a bar on a terminal, plain lines elsewhere.

use std::io::{IsTerminal, stderr};

use indicatif::{ProgressBar, ProgressStyle};
use mpypi_protocol::Entry;

use crate::{
    lint::Severity,
    publish::{Event, Observer},
    report::{count, painted, say, size, wants_color},
    wheel::pack::ANY,
};

/// Shows a publish.
#[derive(Debug)]
pub struct Progress {
    lines: Lines,
    bar: Option<ProgressBar>,
    stage: Stage,
}

/// Whether each package gets a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lines {
    /// For people.
    Shown,
    /// With `--json`: only warnings.
    Hidden,
}

/// How far a publish got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// The list was not sent: the old release stands.
    Before,
    /// The list was sent: the old or the new release stands.
    Committing,
}

impl Progress {
    /// Nothing happened yet.
    #[must_use]
    pub fn new(lines: Lines) -> Progress {
        Progress { lines, bar: None, stage: Stage::Before }
    }

    /// How far the publish got.
    #[must_use]
    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// Removes the bar, before other output.
    pub fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
        self.stage = Stage::Before;
    }

    fn line(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| say(line)),
            None => say(line),
        }
    }

    fn labelled(&self, label: &str, code: &str, text: &str) {
        self.line(&format!("{} {text}", painted(label, code, wants_color(&stderr()))));
    }
}

impl Observer for Progress {
    fn event(&mut self, event: Event<'_>) {
        match event {
            Event::Warning(text) => self.labelled("warning:", "33;1", text),
            Event::Lost { error, pause } => {
                let text = format!("{error}; trying again in {:.1} s", pause.as_secs_f64());
                self.labelled("warning:", "33;1", &text);
            }
            Event::Finding(finding) => match finding.severity {
                Severity::Note if self.lines == Lines::Hidden => {}
                Severity::Note => self.labelled("note:", "36;1", &finding.to_string()),
                Severity::Refusal | Severity::Warning => {
                    self.labelled("warning:", "33;1", &finding.to_string())
                }
            },
            Event::Committing => self.stage = Stage::Committing,
            _ if self.lines == Lines::Hidden => {}
            Event::Note(text) => self.labelled("note:", "36;1", text),
            Event::Fetching { bytes } if stderr().is_terminal() => {
                let bar = self.bar.get_or_insert_with(|| {
                    let style = ProgressStyle::with_template("{spinner} fetching {bytes} {bytes_per_sec}");
                    ProgressBar::new_spinner()
                        .with_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()))
                });
                bar.set_position(bytes);
            }
            Event::Fetching { .. } => {}
            Event::Compiling { done, files } if stderr().is_terminal() => {
                let bar = self.bar.get_or_insert_with(|| {
                    let style = ProgressStyle::with_template("compiling [{bar:30}] {pos}/{len}");
                    let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
                    ProgressBar::new(files as u64).with_style(style.progress_chars("=> "))
                });
                bar.set_position(done as u64);
                if done == files
                    && let Some(bar) = self.bar.take()
                {
                    bar.finish_and_clear();
                }
            }
            Event::Compiling { done: 0, files } => self.line(&format!("compiling {}", count(files, "file"))),
            Event::Compiling { .. } => {}
            Event::Sending { packages, bytes } if stderr().is_terminal() => {
                // After a lost connection there is an old one.
                if let Some(bar) = self.bar.take() {
                    bar.finish_and_clear();
                }
                let bar = ProgressBar::new(bytes);
                let template = match wants_color(&stderr()) {
                    true => "{msg} [{bar:30.green}] {bytes}/{total_bytes} {bytes_per_sec}",
                    false => "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec}",
                };
                let style = ProgressStyle::with_template(template);
                bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> "));
                bar.set_message(format!("sending {}", count(packages, "package")));
                self.bar = Some(bar);
            }
            Event::Sending { packages, bytes } => {
                self.line(&format!("sending {}, {}", count(packages, "package"), size(bytes)));
            }
            Event::Taken(bytes) => {
                if let Some(bar) = &self.bar {
                    bar.inc(bytes);
                }
            }
            Event::Sent { package, bytes } if self.bar.is_none() => {
                self.line(&format!("sent {} ({})", named(&package.entry), size(bytes)));
            }
            Event::Sent { .. } => {}
        }
    }
}

fn named(entry: &Entry) -> String {
    match entry {
        Entry::Wheel(wheel) => match wheel.tag.as_deref().filter(|tag| *tag != ANY) {
            Some(tag) => format!("wheel {} {} for {tag}", wheel.name, wheel.version),
            None => format!("wheel {} {}", wheel.name, wheel.version),
        },
        Entry::Src(src) => format!("src {}", src.path),
        other => other.kind().to_owned(),
    }
}
