//! `mpypi-broker gc`

use mpypi_broker::control::{Answer, Done, Link, LinkError, Missing, Request};
use serde_json::json;

use crate::{
    cli::GcArgs,
    commands::progress::{count, size},
    log,
};

pub(crate) fn run(args: &GcArgs) -> anyhow::Result<()> {
    log::to_stderr(false, "warn")?;
    let mut link = Link::open(&args.data.data, Missing::Refuse)?;
    let grace = args.grace.map(|grace| grace.as_secs());
    let request = Request::Gc { dry_run: args.dry_run, keep: args.keep, grace };
    let mut packages = Vec::new();
    let Done { messages, bytes } = link.ask(&request, |answer| {
        match answer {
            Answer::Garbage(garbage) if args.data.json => packages.push(garbage),
            Answer::Garbage(garbage) => println!("{:>10}  {}", size(garbage.size), garbage.topic),
            _ => {}
        }
        Ok::<(), LinkError>(())
    })?;
    if args.data.json {
        let answer = json!({
            "dry_run": args.dry_run, "packages": packages, "messages": messages, "bytes": bytes,
        });
        println!("{answer}");
        return Ok(());
    }
    match args.dry_run {
        true => println!("{}, {}, would go", count(messages, "package"), size(bytes)),
        false => println!("{}, {}, removed", count(messages, "package"), size(bytes)),
    }
    Ok(())
}
