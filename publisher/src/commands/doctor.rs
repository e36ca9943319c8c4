//! `mpypi doctor`

use std::{
    fmt::Write as _,
    io::{IsTerminal, stderr, stdout},
    time::Duration,
};

use indicatif::{ProgressBar, ProgressStyle};
use mpypi_client::{
    BrokerArgs,
    args::{parse_size, parse_time},
};
use mpypi_protocol::{limits::PACKET, topic::check_name};
use serde_json::json;

use super::{Stopped, brokers, interrupted, print};
use crate::{
    doctor::{
        Doctor, Engine, Observations, Options, Recognised, Row, Verdict,
        engines::{self, Advice, Source},
        judge::{self, judge},
        probes::BELOW,
    },
    limits,
    report::{painted, say, wants_color},
};

const EXAMPLES: &str = "\
Tries with real messages what mpypi needs of a broker, below a topic of its own, and clears them again, also after Ctrl-C. \
`ok` is as it should be, `weak` works and is good to know, `no` makes a broker unfit, `?` cannot be told. Of several brokers the \
first that answers is tried in full, and all of them on whether they show the same. Log in as the user who will publish.

Examples:
  mpypi doctor                                          the broker on this machine
  mpypi doctor --broker mqtts://ci:…@hub.local --json
  mpypi doctor --broker mqtt://a.local,mqtt://b.local,mqtt://c.local
  mpypi doctor --engine vernemq                         also say what is known of an engine that does not say its name

Exit codes: 0 fit, 1 could not be tried, 2 wrong usage, 3 not fit.";

/// The number of the form of what `--json` prints: raised when a key goes, or means something else.
const SCHEMA: u32 = 1;

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(flatten)]
    broker: BrokerArgs,
    /// The largest retained payload to try, as 900000, 512K or 4M
    #[arg(long, value_name = "SIZE", default_value = "8M", value_parser = parse_max)]
    max: u64,
    /// The topic below which all is tried, but for what this user may not write: one where they may read, write and clear
    #[arg(long, value_name = "TOPIC", default_value = BELOW, value_parser = parse_below)]
    below: String,
    /// How long several brokers may take to show what was published at another, as 500ms or 2m
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_time)]
    agree_within: Duration,
    /// Which broker it is, where it does not say so itself
    #[arg(long, value_enum)]
    engine: Option<Engine>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// How far the search for the largest payload goes.
fn parse_max(text: &str) -> Result<u64, String> {
    parse_size(text, limits::DOCTOR_SMALLEST, limits::DOCTOR_LARGEST_MOST)
}

/// A topic below which nothing of anybody's is.
fn parse_below(text: &str) -> Result<String, String> {
    let text = text.trim_end_matches('/');
    check_name(text).map_err(|error| error.to_string())?;
    let is_ours = text == "mpypi" || text.starts_with("mpypi/");
    let is_packages = text == BELOW || text.starts_with(&format!("{BELOW}/"));
    match text.starts_with('$') || (is_ours && !is_packages) {
        true => {
            Err(format!("channels and nodes have topics there: use `{BELOW}`, or a topic outside `mpypi/`"))
        }
        false => Ok(text.to_owned()),
    }
}

pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    // What somebody once wrote down that they take is not believed: it is tried.
    let brokers = brokers(args.broker)?.taking(PACKET);
    let bar = (stderr().is_terminal() && !args.json).then(|| {
        let style = ProgressStyle::with_template("{spinner} trying {msg}");
        let bar =
            ProgressBar::new_spinner().with_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
        bar.enable_steady_tick(Duration::from_millis(100));
        bar
    });
    let tell = |what: &str| {
        if let Some(bar) = &bar {
            bar.set_message(what.to_owned());
        }
    };
    let options = Options { below: args.below, largest: args.max, agree_within: args.agree_within };
    let mut doctor = Doctor::new(&brokers, options, tell);
    let seen = tokio::select! {
        seen = doctor.examine() => Some(seen),
        stop = interrupted() => {
            stop?;
            None
        }
    };
    tell("to leave nothing behind");
    let left = tokio::select! {
        left = doctor.clean() => left,
        stop = interrupted() => {
            stop?;
            doctor.left()
        }
    };
    if let Some(bar) = &bar {
        bar.finish_and_clear();
    }
    for topic in &left {
        let warning = painted("warning:", "33;1", wants_color(&stderr()));
        say(&format!("{warning} a message may be left on `{topic}`: clear it by an empty retained one"));
    }
    let Some(seen) = seen else { return Err(Stopped::Reading.into()) };
    let seen = seen?;
    let told = args.engine.map(|engine| Recognised { engine, version: None, by: "the command line" });
    let engine = told.or_else(|| engines::recognise(&seen));
    let rows = judge(&seen, engine.as_ref().map(|recognised| recognised.engine));
    let broker = seen.addresses[seen.examined].url.clone();
    let all: Vec<&str> = seen.addresses.iter().map(|address| address.url.as_str()).collect();
    let fit = judge::expect_fit(&all.join(","), &rows);
    print(&match args.json {
        true => format!("{}\n", json(&seen, engine.as_ref(), &rows, fit.is_ok(), &left)),
        false => text(&broker, engine.as_ref(), &rows, wants_color(&stdout())),
    })?;
    Ok(fit?)
}

fn json(
    seen: &Observations,
    engine: Option<&Recognised>,
    rows: &[Row],
    is_fit: bool,
    left: &[String],
) -> serde_json::Value {
    json!({
        "schema": SCHEMA,
        "fit": is_fit,
        "broker": seen.addresses[seen.examined].url,
        "engine": engine,
        "checks": rows,
        "advice": engine.map(|recognised| recognised.engine.advice()).unwrap_or_default(),
        "largest": seen.largest.kept,
        "left": left,
        "observed": seen,
    })
}

fn text(broker: &str, engine: Option<&Recognised>, rows: &[Row], color: bool) -> String {
    let mut text = match engine {
        Some(Recognised { engine, version, by }) => {
            let version = version.as_deref().map(|version| format!(" {}", version.escape_debug()));
            format!("{broker}: {}{}, by {by}\n", engine.name(), version.unwrap_or_default())
        }
        None => format!("{broker}: an engine that does not say which\n"),
    };
    let width = rows.iter().map(|row| row.check.name().len()).max().unwrap_or_default();
    for Row { check, verdict, why, hint } in rows {
        let code = match verdict {
            Verdict::Ok => "32",
            Verdict::Weak => "33",
            Verdict::No => "31;1",
            Verdict::Unknown => "2",
        };
        let verdict = painted(&format!("{verdict:<4}"), code, color);
        // A broker may say anything, commands to the terminal included.
        let _ = writeln!(text, "{verdict}  {:<width$}  {}", check.name(), plain(why));
        if let Some(hint) = hint {
            let _ =
                writeln!(text, "{:width$}        {} {}", "", painted("hint:", "36;1", color), plain(hint));
        }
    }
    let advice = engine.map(|recognised| recognised.engine.advice()).unwrap_or_default();
    if let Some(Recognised { engine, .. }) = engine {
        let _ = writeln!(text, "\nof {}:", engine.name());
    }
    for Advice { text: advice, source } in advice {
        let mark = match source {
            Source::Tested => "",
            Source::Manual => " (by its manual, untested)",
        };
        let _ = writeln!(text, "- {advice}{mark}");
    }
    text
}

/// Text without control characters.
fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_as_a_default_is_the_limit_of_that_name() {
        assert_eq!(Ok(limits::DOCTOR_LARGEST), parse_max("8M"));
        assert_eq!(Ok(limits::DOCTOR_AGREE), parse_time("10s"));
        assert!(parse_max("0").is_err() && parse_max("16M").is_err(), "nothing, and more than a packet");
    }

    #[test]
    fn nothing_is_tried_where_channels_and_nodes_are() {
        assert_eq!(parse_below("test/here/"), Ok("test/here".to_owned()));
        assert_eq!(parse_below("mpypi/packages/src/doctor"), Ok("mpypi/packages/src/doctor".to_owned()));
        for wrong in
            ["", "mpypi", "mpypi/channels", "mpypi/nodes/a", "mpypi/packages", "$SYS/x", "a/#", "a/+/b"]
        {
            assert!(parse_below(wrong).is_err(), "{wrong}");
        }
    }
}
