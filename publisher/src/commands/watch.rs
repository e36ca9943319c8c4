//! `mpypi watch`

use std::{
    io::{stderr, stdout},
    path::PathBuf,
};

use super::{interrupted, places, print};
use crate::{
    cli::Source,
    lint::Finding,
    plan::Trust,
    progress::{Lines, Progress},
    publish::{Event, Mode, Observer, Options, Outcome, PublishError},
    report::{self, chain, painted, say, wants_color},
    watch::{WatchObserver, watch},
};

const EXAMPLES: &str = "\
Only what changed is sent. After an error, watching goes on; Ctrl-C or SIGTERM ends it, with exit code 0.

Examples:
  mpypi watch channels/dev
  mpypi watch ~/project --channel bench --json     one JSON object for each release";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The channel's folder
    folder: PathBuf,
    #[command(flatten)]
    source: Source,
    /// Print one JSON object a line, for each release
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    let harm = args.source.harm();
    let signing = args.source.keys.signing(args.source.signer.clone());
    let options = Options {
        brokers: args.source.cut.applied(places(args.source.place)?),
        channel: args.source.channel,
        mode: Mode::Publish,
        trust: Trust::List,
        sequence: None,
        harm,
        signing,
        rollout: None,
        commit: None,
    };
    let lines = if args.json { Lines::Hidden } else { Lines::Shown };
    let mut screen =
        Screen { json: args.json, progress: Progress::new(lines), told: vec![], telling: vec![] };
    if !args.json {
        say(&format!("watching {}; Ctrl-C ends it", args.folder.display()));
    }
    tokio::select! {
        result = watch(&args.folder, &options, &mut screen) => match result? {},
        stop = interrupted() => stop?,
    }
    screen.progress.clear();
    Ok(())
}

struct Screen {
    json: bool,
    progress: Progress,
    /// What is known of Mpy-BLOX nodes: said once, not at every save.
    told: Vec<Finding>,
    telling: Vec<Finding>,
}

impl Observer for Screen {
    fn event(&mut self, event: Event<'_>) {
        match event {
            Event::Finding(finding) => {
                self.telling.push(finding.clone());
                if !self.told.contains(finding) {
                    self.progress.event(event);
                }
            }
            event => self.progress.event(event),
        }
    }
}

impl WatchObserver for Screen {
    fn published(&mut self, outcome: &Outcome) {
        self.progress.clear();
        self.told = std::mem::take(&mut self.telling);
        let text = match self.json {
            true => format!("{}\n", report::json(outcome)),
            false => {
                let diff = report::diff(&outcome.diff, wants_color(&stdout()));
                format!("{diff}{}\n", report::sentence(outcome))
            }
        };
        if let Err(error) = print(&text) {
            say(&format!("warning: cannot write to stdout: {error}"));
        }
    }

    fn failed(&mut self, error: &PublishError) {
        self.progress.clear();
        // They belong to the error.
        self.told.clear();
        self.telling.clear();
        let color = wants_color(&stderr());
        say(&format!("{} {}", painted("error:", "31;1", color), chain(error)));
        if let Some(hint) = error.hint() {
            say(&format!("{} {hint}", painted("hint:", "36;1", color)));
        }
    }
}
