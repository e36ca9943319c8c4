//! `mpypi-broker restore`

use std::collections::BTreeMap;

use mpypi_broker::backup::{Restored, Verdict, plan, put_back, read};
use serde_json::json;

use crate::{
    cli::RestoreArgs,
    commands::progress::{Shown, count, size},
    log,
};

/// Says whether everything that should be put back was.
pub(crate) fn run(args: &RestoreArgs) -> anyhow::Result<bool> {
    log::to_stderr(false, "warn")?;
    let data = &args.data.data;
    let shown = Shown::new("checking the backup");
    let contents = read(&args.folder, |progress| shown.at(progress))?;
    drop(shown);
    let planned = plan(data, &contents, args.replace)?;
    let mut verdicts = BTreeMap::<Verdict, Vec<&str>>::new();
    for (kept, (verdict, _)) in contents.messages.iter().zip(&planned.verdicts) {
        verdicts.entry(*verdict).or_default().push(&kept.topic);
    }
    let topics = |verdict| verdicts.get(&verdict).map(Vec::as_slice).unwrap_or_default();
    let restored = match args.dry_run {
        true => Restored::default(),
        false => {
            let shown = Shown::new("putting back");
            put_back(data, &args.folder, &contents, &planned, |progress| shown.at(progress))?
        }
    };
    if args.data.json {
        let answer = json!({
            "dry_run": args.dry_run, "put": topics(Verdict::Put), "replace": topics(Verdict::Replace),
            "same": topics(Verdict::Same).len(), "differs": topics(Verdict::Differs),
            "newer": topics(Verdict::Newer), "expired": topics(Verdict::Expired).len(), "restored": restored,
        });
        println!("{answer}");
        return Ok(restored.refused.is_empty());
    }
    for topic in topics(Verdict::Newer) {
        println!("kept: `{topic}`, whose release is as new as the backup's, or newer");
    }
    for topic in topics(Verdict::Differs) {
        println!("kept: `{topic}`, which differs from the backup; `--replace` puts the backup's there");
    }
    if args.dry_run {
        for (verdict, what) in [(Verdict::Put, "would put"), (Verdict::Replace, "would replace")] {
            for topic in topics(verdict) {
                println!("{what}: `{topic}`");
            }
        }
        let number = topics(Verdict::Put).len() + topics(Verdict::Replace).len();
        println!("{} would be put back; nothing was changed", count(number as u64, "message"));
        return Ok(true);
    }
    let Restored { messages, bytes, refused, files, files_kept } = &restored;
    println!(
        "{} put back, {}; {} there already, {} expired since",
        count(*messages, "message"),
        size(*bytes),
        topics(Verdict::Same).len(),
        topics(Verdict::Expired).len(),
    );
    for name in files {
        println!("put back: `{name}`");
    }
    for name in files_kept {
        println!("kept: `{}`, which is the broker's own business while it runs or has one", name);
    }
    for (topic, why) in refused {
        eprintln!("error: `{topic}` was refused: {why}");
    }
    Ok(refused.is_empty())
}
