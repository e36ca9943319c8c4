//! `mpypi rollback` and `mpypi promote`

use mpypi_protocol::ChannelName;
use serde_json::json;

use super::{Stopped, interrupted, places, print};
use crate::{
    cli::{PlaceArgs, SignArgs},
    reissue::{Options, Reissued, Source, reissue},
    report::count,
};

const ROLLBACK: &str = "\
Devices never go back by themselves to a release that is older than one they have seen: that is what an attacker would \
want. So what release 41 was gets a new number, and is signed again. Nothing is sent but the list.

Examples:
  mpypi rollback dev --to 41
  mpypi rollback dev --to 41 --revoke     no device may go on with the releases after it";

#[derive(Debug, clap::Args)]
#[command(after_help = ROLLBACK)]
pub(crate) struct RollbackArgs {
    /// The channel
    channel: ChannelName,
    /// The release to go back to
    #[arg(long, value_name = "NUMBER")]
    to: u64,
    /// Revoke the releases after it: devices that run one of them leave it whatever a rollout says
    #[arg(long)]
    revoke: bool,
    #[command(flatten)]
    common: Common,
}

const PROMOTE: &str = "\
Examples:
  mpypi promote dev stable     stable gets what dev has now, byte for byte, signed by a key of stable";

#[derive(Debug, clap::Args)]
#[command(after_help = PROMOTE)]
pub(crate) struct PromoteArgs {
    /// The channel that has the release
    from: ChannelName,
    /// The channel that gets it
    to: ChannelName,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, clap::Args)]
struct Common {
    #[command(flatten)]
    place: PlaceArgs,
    #[command(flatten)]
    sign: SignArgs,
    /// Print the outcome as one JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) async fn rollback(args: RollbackArgs) -> anyhow::Result<()> {
    run(args.channel, Source::History(args.to), args.revoke, args.common).await
}

pub(crate) async fn promote(args: PromoteArgs) -> anyhow::Result<()> {
    run(args.to, Source::Channel(args.from), false, args.common).await
}

async fn run(channel: ChannelName, source: Source, revoke: bool, common: Common) -> anyhow::Result<()> {
    let options = Options {
        brokers: places(common.place)?,
        channel: channel.clone(),
        source: source.clone(),
        revoke,
        keys: common.sign.keys.folder(),
        key: common.sign.signer,
    };
    let Reissued { release, of, packages, published } = tokio::select! {
        done = reissue(&options) => done?,
        stop = interrupted() => {
            stop?;
            return Err(Stopped::DuringTheList.into());
        }
    };
    let (sequence, version) = (release.sequence, &release.version);
    if common.json {
        let outcome = json!({
            "channel": channel, "sequence": sequence, "version": version, "of": of, "published": published,
            "packages": packages, "revoked": release.revoked,
        });
        return print(&format!("{outcome}\n"));
    }
    let packages = count(packages, "package");
    let origin = match (&source, of) {
        (Source::History(_), Some(of)) => format!("release {of}"),
        (Source::Channel(other), Some(of)) => format!("{other} release {of}"),
        (_, None) => "a list without a number".to_owned(),
    };
    print(&match published {
        true => {
            format!(
                "published {channel} release {sequence} (version {version}): {packages}, as {origin} had\n"
            )
        }
        false => format!("{channel} has that already, at release {sequence}: nothing sent\n"),
    })
}
