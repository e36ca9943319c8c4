//! `mpypi status`

use std::io::stdout;

use comfy_table::{Cell, Color, ContentArrangement, Table, presets};
use mpypi_client::BrokerArgs;
use mpypi_protocol::{ChannelName, Entry, NodeId, UpdateList, list::Release, node::State};
use serde_json::{Value, json};

use super::{brokers, print, reading};
use crate::{
    report::{count, painted, short, size, wants_color},
    status::{Behind, ChannelStatus, NodeStatus, Status, status},
    wheel::pack::ANY,
};

const EXAMPLES: &str = "\
Examples:
  mpypi status               all channels, in a line each, and all nodes
  mpypi status dev stable    two channels with their packages and nodes
  mpypi status dev --json
  mpypi status --broker mqtt://a.local,mqtt://b.local
                             the newest that any of them has, and which of them has something else";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The channels [default: all]
    #[arg(value_name = "CHANNEL")]
    channels: Vec<ChannelName>,
    #[command(flatten)]
    broker: BrokerArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    let brokers = brokers(args.broker)?;
    let status = reading(status(&brokers, &args.channels)).await?;
    match args.json {
        true => {
            let mut value = to_json(&status);
            if brokers.are_several() {
                let differ = status.behind.iter().map(|behind| {
                    json!({ "broker": behind.broker, "channel": behind.channel, "trouble": behind.why })
                });
                value["differ"] = differ.collect();
            }
            print(&format!("{value}\n"))
        }
        false => {
            let detail = if args.channels.is_empty() { Detail::Summary } else { Detail::Entries };
            print(&to_text(&status, detail, wants_color(&stdout())))
        }
    }
}

/// How much is shown of each channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Detail {
    Summary,
    Entries,
}

fn to_text(status: &Status, detail: Detail, color: bool) -> String {
    let mut text = String::new();
    for (name, channel) in &status.channels {
        let name = painted(name.as_str(), "1", color);
        match channel {
            ChannelStatus::Nothing => text += &format!("{name}: nothing published\n"),
            ChannelStatus::Invalid(problem) => {
                text += &format!("{name}: retains no update list: {problem}\n");
            }
            ChannelStatus::List(list) => {
                text += &format!("{name}: {}\n", title(list));
                if detail == Detail::Entries {
                    text += &format!("{}\n", entries(list).trim_fmt());
                }
            }
        }
    }
    match (status.channels.is_empty(), status.nodes.is_empty()) {
        (true, true) => text += "no channels and no nodes\n",
        (false, true) => text += "no nodes\n",
        (_, false) => text += &format!("{}\n", nodes(status, color).trim_fmt()),
    }
    for Behind { broker, channel, why } in &status.behind {
        let channel = channel.as_ref().map(|channel| format!("{channel}: ")).unwrap_or_default();
        text += &format!("{} {broker}: {channel}{}\n", painted("!", "31;1", color), why.escape_debug());
    }
    text
}

fn title(list: &UpdateList) -> String {
    let packages = list.packages().count();
    let bytes = list.packages().filter_map(|(_, size)| size).sum();
    let packages = format!("{}, {}", count(packages, "package"), size(bytes));
    let Some(release) = list.release() else { return format!("a list without a release, {packages}") };
    let created = release.created.map(|time| format!(", made {time}")).unwrap_or_default();
    let expires = release.expires.map(|time| format!(", expires {time}")).unwrap_or_default();
    let commit = release.commit().map(|commit| format!(", of commit {}", short(commit))).unwrap_or_default();
    format!(
        "release {} (version {}), {packages}{created}{expires}{commit}",
        release.sequence, release.version
    )
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(header);
    table
}

fn entries(list: &UpdateList) -> Table {
    let listed = || list.entries().iter().filter(|entry| !matches!(entry, Entry::Release(_)));
    let special = |entry: &Entry| match entry {
        Entry::Wheel(wheel) => wheel.tag.clone().filter(|tag| tag != ANY),
        Entry::Firmware(image) => image.target.clone(),
        _ => None,
    };
    // Most channels hold only what is for all of their devices.
    let shows_target = listed().any(|entry| special(entry).is_some());
    let mut header = vec!["TYPE", "NAME", "VERSION", "SIZE", "SHA-256"];
    header.extend(shows_target.then_some("FOR"));
    let mut table = table(&header);
    for entry in listed() {
        let (name, version) = match entry {
            Entry::Wheel(wheel) => (wheel.name.clone(), wheel.version.clone()),
            Entry::Src(src) => (src.path.to_string(), String::new()),
            Entry::Firmware(image) => (image.name.clone(), image.version.clone()),
            _ => Default::default(),
        };
        let (digest, bytes) = match entry.package() {
            Some((id, bytes)) => (id.digest().short(), bytes.map(size).unwrap_or_default()),
            None => Default::default(),
        };
        let mut row = vec![entry.kind().to_owned(), name, version, bytes, digest];
        row.extend(shows_target.then(|| special(entry).unwrap_or_default()));
        table.add_row(row);
    }
    table
}

fn nodes(status: &Status, color: bool) -> Table {
    let mut table = table(&["NODE", "ONLINE", "CHANNEL", "RELEASE", "PHASE", "RECEIVED", "ERROR"]);
    match color {
        true => table.enforce_styling(),
        false => table.force_no_tty(),
    };
    for (id, node) in &status.nodes {
        let state = node.state.as_ref();
        let online = match node.online {
            Some(true) => Cell::new("yes").fg(Color::Green),
            Some(false) => Cell::new("no").fg(Color::Red),
            None => Cell::new("?"),
        };
        let release = state.and_then(|state| state.sequence).map(|sequence| sequence.to_string());
        let received = state.map(|state| format!("{}/{}", size(state.done), size(state.total)));
        table.add_row([
            Cell::new(id),
            online,
            Cell::new(node.channel().map(|channel| channel.to_string()).unwrap_or_default()),
            Cell::new(release.unwrap_or_default()),
            Cell::new(state.map(phase).unwrap_or_default()),
            Cell::new(received.unwrap_or_default()),
            // A node may say anything, commands to the terminal included.
            Cell::new(state.and_then(|state| state.error.as_deref()).unwrap_or_default().escape_debug()),
        ]);
    }
    table
}

fn phase(state: &State) -> String {
    match state.held {
        Some(held) => format!("{}, {held} is held", state.phase),
        None => state.phase.to_string(),
    }
}

fn to_json(status: &Status) -> Value {
    let channels: Vec<Value> =
        status.channels.iter().map(|(name, status)| channel_json(name, status)).collect();
    let nodes: Vec<Value> = status.nodes.iter().map(|(id, node)| node_json(id, node)).collect();
    json!({ "channels": channels, "nodes": nodes })
}

fn channel_json(name: &ChannelName, status: &ChannelStatus) -> Value {
    let (list, error) = match status {
        ChannelStatus::Nothing => (None, None),
        ChannelStatus::List(list) => (Some(list), None),
        ChannelStatus::Invalid(problem) => (None, Some(problem)),
    };
    let release = list.and_then(UpdateList::release);
    let entries: Value = list
        .and_then(|list| serde_json::from_slice(&list.to_bytes()).ok())
        .unwrap_or_else(|| Value::Array(Vec::new()));
    json!({
        "channel": name,
        "sequence": release.map(|release| release.sequence),
        "version": release.map(|release| release.version.clone()),
        "commit": release.and_then(Release::commit),
        "error": error,
        "entries": entries,
    })
}

fn node_json(id: &NodeId, node: &NodeStatus) -> Value {
    json!({
        "node": id,
        "online": node.online,
        "channel": node.channel(),
        "state": node.state,
        "info": node.info,
    })
}
