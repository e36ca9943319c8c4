//! `mpypi-broker backup`

use mpypi_broker::backup::{Saved, save};

use crate::{
    cli::BackupArgs,
    commands::progress::{Shown, count, size},
    log,
};

/// Says whether everything is in the backup.
pub(crate) fn run(args: &BackupArgs) -> anyhow::Result<bool> {
    log::to_stderr(false, "warn")?;
    let shown = Shown::new("backing up");
    let saved = save(&args.data.data, &args.folder, !args.no_users, |progress| shown.at(progress))?;
    drop(shown);
    if args.data.json {
        println!("{}", serde_json::to_string(&saved)?);
    } else {
        let Saved { messages, bytes, copied, reused, removed, .. } = &saved;
        println!(
            "{} in `{}`, {}: {} copied, {reused} there before, {removed} removed",
            count(*messages, "message"),
            args.folder.display(),
            size(*bytes),
            count(*copied, "blob"),
        );
    }
    for topic in &saved.damaged {
        eprintln!("error: `{topic}` is damaged in the index: it is not in the backup");
    }
    if !saved.damaged.is_empty() {
        eprintln!("hint: publish these again, then back up again");
    }
    Ok(saved.damaged.is_empty())
}
