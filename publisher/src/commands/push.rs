//! `mpypi push`

use std::{
    collections::BTreeSet,
    fs::File,
    io::{self, Read, stderr},
    path::{Path, PathBuf},
    time::Duration,
};

use mpypi_client::{BrokerArgs, args::parse_time};
use mpypi_protocol::{ChannelName, NodeId};
use serde_json::json;

use super::{brokers, interrupted, print, reading};
use crate::{
    cli::KeyArgs,
    limits,
    push::{Observer, Options, Orders, PushError, Results, Target, follow, push},
    report::{painted, say, wants_color},
};

const EXAMPLES: &str = "\
Devices with projectMM know no lists. This tells each of them, over HTTP, where the newest image of the channel for its \
hardware is, and waits until it runs it. What they say is published as nodes say it: `mpypi status` shows them like all \
others. The broker must let this user write that.

A rollout holds for them as for nodes that decide themselves: who is in by percentage and query comes first, at its time of \
day, after its share of the jitter; the others are held. With --follow, this goes on for ever: each step of a rollout, and \
each new release, goes to whose turn it is.

A file of devices has one on each line, as --device takes it, and perhaps labels for queries: \
lamp=http://10.0.0.7 room=kitchen. What follows a # is left out.

Examples:
  mpypi push dev --gateway http://hub.local:8080 --device lamp=http://10.0.0.7 --device sign=http://10.0.0.8
  mpypi push dev --gateway http://hub.local:8080 --devices lamps.txt --parallel 4 --max-failures 2
  mpypi push dev --gateway http://hub.local:8080 --devices lamps.txt --follow

Exit codes: 0 all run what the channel has, or are held, 1 failed, 2 wrong usage, 3 some device does not.";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The channel whose firmware is pushed
    channel: ChannelName,
    #[command(flatten)]
    broker: BrokerArgs,
    #[command(flatten)]
    keys: KeyArgs,
    /// Where devices fetch packages from: the broker's HTTP gateway, as they reach it
    #[arg(long, value_name = "URL", value_parser = parse_url)]
    gateway: String,
    /// A device: what it is called, and where it speaks HTTP; may be given more than once
    #[arg(long = "device", value_name = "NAME=URL", required_unless_present = "file", value_parser = parse_target)]
    devices: Vec<Target>,
    /// A file of devices
    #[arg(long = "devices", value_name = "FILE")]
    file: Option<PathBuf>,
    /// How far the devices' local time is ahead of UTC, in minutes: a rollout's window is local then
    #[arg(long, value_name = "MINUTES", allow_negative_numbers = true, value_parser = clap::value_parser!(i32).range(-1440..=1440))]
    utc_offset: Option<i32>,
    /// How long a device may take, as 90s or 5m
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = parse_time)]
    timeout: Duration,
    /// How many devices are updated at a time
    #[arg(long, value_name = "NUMBER", default_value_t = 1, value_parser = parse_parallel)]
    parallel: usize,
    /// When more devices than this failed, begin with no other [default: go on]
    #[arg(long, value_name = "NUMBER")]
    max_failures: Option<usize>,
    /// Wait so long for devices whose turn is later
    #[arg(long, value_name = "TIME", default_value = "0s", value_parser = parse_time)]
    wait: Duration,
    /// Install what waits for an order, or for its time of day, as `[{"type":"install"}]` does with nodes
    #[arg(long)]
    install: bool,
    /// Go on for ever; Ctrl-C or SIGTERM ends it, with exit code 0
    #[arg(long)]
    follow: bool,
    /// Print the outcome as one JSON object, with --follow one a line; errors go to standard error as always
    #[arg(long)]
    json: bool,
}

/// Some device does not run what it should.
#[derive(Debug, thiserror::Error)]
#[error("{0} of the devices do not run what channel `{1}` has")]
pub(crate) struct NotAll(usize, ChannelName);

/// A file of devices cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DevicesError {
    /// It cannot be read.
    #[error("cannot read `{}`", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A line of it is no device.
    #[error("`{}`, line {line}: {problem}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Which, from 1.
        line: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// Two devices have one name, or one device two.
    #[error("device `{0}` is there twice")]
    Twice(String),
    /// There are none.
    #[error("there is no device to push to")]
    None,
    /// There are too many.
    #[error("{0} devices are more than {most}", most = limits::PUSH_DEVICES)]
    TooMany(usize),
}

pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    let trust = args.broker.trust.clone();
    let mut devices = args.devices;
    if let Some(file) = &args.file {
        devices.extend(read(file)?);
    }
    check(&devices)?;
    for device in &mut devices {
        device.utc_offset = args.utc_offset;
    }
    let options = Options {
        brokers: brokers(args.broker)?,
        channel: args.channel,
        keys: args.keys.folder(),
        gateway: args.gateway,
        devices,
        trust,
        timeout: args.timeout,
        parallel: args.parallel,
        max_failures: args.max_failures,
        orders: if args.install { Orders::Given } else { Orders::None },
        wait: args.wait,
    };
    let mut screen = Screen { channel: options.channel.clone(), json: args.json, shown: None };
    if args.follow {
        return tokio::select! {
            result = follow(&options, &mut screen) => match result? {},
            stop = interrupted() => Ok(stop?),
        };
    }
    let results = reading(push(&options, &mut screen)).await?;
    print(&screen.text(&results))?;
    match results.iter().filter(|(_, became)| !became.is_good()).count() {
        0 => Ok(()),
        count => Err(NotAll(count, options.channel).into()),
    }
}

struct Screen {
    channel: ChannelName,
    json: bool,
    /// What was shown last.
    shown: Option<Results>,
}

impl Screen {
    fn text(&self, results: &Results) -> String {
        if !self.json {
            return results.iter().map(|(node, became)| format!("{node}  {became}\n")).collect();
        }
        let rows = results.iter().map(|(node, became)| {
            json!({ "node": node, "good": became.is_good(), "became": became.word(), "result": became.to_string() })
        });
        format!("{}\n", json!({ "channel": self.channel, "devices": rows.collect::<Vec<_>>() }))
    }
}

impl Observer for Screen {
    fn device(&mut self, node: &NodeId, text: &str) {
        if !self.json {
            say(&format!("{node}  {text}"));
        }
    }

    fn round(&mut self, results: &Results) {
        if self.shown.as_ref() != Some(results) {
            if let Err(error) = print(&self.text(results)) {
                say(&format!("warning: cannot write to stdout: {error}"));
            }
            self.shown = Some(results.clone());
        }
    }

    fn lost(&mut self, error: &PushError, pause: Duration) {
        let label = painted("warning:", "33;1", wants_color(&stderr()));
        say(&format!("{label} {error}; trying again in {:.1} s", pause.as_secs_f64()));
    }
}

fn read(path: &Path) -> Result<Vec<Target>, DevicesError> {
    let read = || {
        let mut text = String::new();
        File::open(path)?.take(limits::PUSH_FILE + 1).read_to_string(&mut text)?;
        match text.len() as u64 > limits::PUSH_FILE {
            true => Err(io::Error::other(format!("it has more than {} bytes", limits::PUSH_FILE))),
            false => Ok(text),
        }
    };
    let text = read().map_err(|source| DevicesError::Read { path: path.to_owned(), source })?;
    let lines =
        text.lines().enumerate().map(|(at, line)| (at + 1, line.split('#').next().unwrap_or_default()));
    let lines = lines.filter(|(_, line)| !line.trim().is_empty());
    let wrong = |line, problem| DevicesError::Line { path: path.to_owned(), line, problem };
    lines.map(|(at, line)| parse_target(line).map_err(|problem| wrong(at, problem))).collect()
}

fn check(devices: &[Target]) -> Result<(), DevicesError> {
    let mut names = BTreeSet::new();
    match devices.len() {
        0 => return Err(DevicesError::None),
        count if count > limits::PUSH_DEVICES => return Err(DevicesError::TooMany(count)),
        _ => {}
    }
    for device in devices {
        for name in [device.node.as_str(), &device.url] {
            if !names.insert(name) {
                return Err(DevicesError::Twice(name.to_owned()));
            }
        }
    }
    Ok(())
}

fn parse_target(text: &str) -> Result<Target, String> {
    let mut words = text.split_whitespace();
    let device = words.next().and_then(|word| word.split_once('='));
    let (node, url) = device.ok_or("use a name and a URL, as lamp=http://10.0.0.7")?;
    let node = NodeId::new(node).map_err(|error| error.to_string())?;
    let labels = words.map(|word| {
        let (name, value) = word.split_once('=').ok_or("use labels as room=kitchen")?;
        Ok((name.to_owned(), value.to_owned()))
    });
    let labels = labels.collect::<Result<_, String>>()?;
    Ok(Target { node, url: parse_url(url)?, labels, utc_offset: None })
}

fn parse_url(text: &str) -> Result<String, String> {
    let good = ["http://", "https://"].iter().any(|scheme| text.starts_with(scheme));
    good.then(|| text.trim_end_matches('/').to_owned())
        .ok_or_else(|| "use a URL, as http://10.0.0.7".to_owned())
}

fn parse_parallel(text: &str) -> Result<usize, String> {
    let number = text.parse().ok().filter(|number| (1..=limits::PUSH_PARALLEL).contains(number));
    number.ok_or_else(|| format!("use a number from 1 to {}", limits::PUSH_PARALLEL))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_devices_is_read_and_what_is_wrong_with_it_is_named_by_its_line() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("lamps.txt");
        std::fs::write(
            &file,
            "# ours\n\nlamp=http://10.0.0.7/ room=kitchen floor=1 # at the door\nsign=https://s\n",
        )
        .unwrap();
        let devices = read(&file).unwrap();
        assert_eq!((devices[0].node.as_str(), &*devices[0].url), ("lamp", "http://10.0.0.7"));
        assert_eq!(devices[0].labels["room"], "kitchen");
        assert_eq!((devices.len(), devices[0].labels.len(), devices[1].labels.len()), (2, 2, 0));
        for (text, problem) in [
            ("\nlamp", "line 2: use a name and a URL"),
            ("lamp=10.0.0.7", "line 1: use a URL"),
            ("la/mp=http://x", "line 1: "),
            ("lamp=http://x kitchen", "line 1: use labels as room=kitchen"),
        ] {
            std::fs::write(&file, text).unwrap();
            let error = read(&file).unwrap_err().to_string();
            assert!(error.contains(problem), "{error}");
        }
        assert!(read(Path::new("/nowhere")).is_err());
    }

    #[test]
    fn a_device_is_there_once() {
        let device = |text: &str| parse_target(text).unwrap();
        let twice = [device("a=http://x"), device("b=http://x/")];
        assert_eq!(check(&twice).unwrap_err().to_string(), "device `http://x` is there twice");
        assert!(check(&[]).is_err());
        assert!(check(&[device("a=http://x"), device("b=http://y")]).is_ok());
    }
}
