//! What people and programs read: sentences, sizes, colours, JSON.

use std::{
    error::Error,
    fmt::Write as _,
    io::{IsTerminal, Write as _, stderr},
};

use mpypi_client::{BrokersError, trust::TrustError};
use mpypi_protocol::ChannelName;
use serde_json::{Value, json};

use crate::{
    clock::ClockError,
    commands::{Stopped, push::NotAll, rollout::RolloutFailure},
    doctor::{judge::Unfit, probes::DoctorError},
    git::GitError,
    install::{InstallError, Installed, Way},
    keys::KeysError,
    lint::Finding,
    plan::{Change, Diff},
    publish::{Done, Outcome, PublishError},
    push::PushError,
    rehearse::RehearsalError,
    retained::AskError,
    rollout::{start::StartError, steer::SteerError},
    settle::{Disagreement, Stands},
};

/// A size for people: `213 B`, `2.3 KiB`, `1.5 MiB`.
#[must_use]
pub fn size(bytes: u64) -> String {
    match bytes {
        0..1024 => format!("{bytes} B"),
        1024..1_048_576 => format!("{:.1} KiB", bytes as f64 / 1024.0),
        _ => format!("{:.1} MiB", bytes as f64 / 1_048_576.0),
    }
}

/// A count of things: `1 package`, `2 packages`.
#[must_use]
pub fn count(number: usize, thing: &str) -> String {
    match number {
        1 => format!("1 {thing}"),
        _ => format!("{number} {thing}s"),
    }
}

/// The outcome in one line, as `published dev release 2 (version 2): 1 of 5 packages sent, 213 B`.
#[must_use]
pub fn sentence(outcome: &Outcome) -> String {
    let Outcome { channel, sequence, packages, sent, bytes_sent, .. } = outcome;
    let commit = outcome.commit.as_deref().map(|commit| format!(" of commit {}", short(commit)));
    let version = format!("version {}{}", outcome.version, commit.unwrap_or_default());
    let bytes = size(*bytes_sent);
    let packages = count(*packages, "package");
    match outcome.done {
        Done::Published => {
            format!("published {channel} release {sequence} ({version}): {sent} of {packages} sent, {bytes}")
        }
        Done::UpToDate => format!("{channel} is up to date at release {sequence}: nothing sent"),
        Done::WouldRefuse => {
            format!("would refuse to publish {channel} release {sequence} ({version})")
        }
        Done::WouldPublish => {
            format!(
                "would publish {channel} release {sequence} ({version}): {sent} of {packages} to send, {bytes}"
            )
        }
    }
}

/// The beginning of a commit's id, as git shows it.
#[must_use]
pub fn short(commit: &str) -> &str {
    commit.get(..12).unwrap_or(commit)
}

/// What changed, one line each: `+` added, `~` changed, `-` removed.
#[must_use]
pub fn diff(diff: &Diff, color: bool) -> String {
    let mut text = String::new();
    let parts = [(&diff.added, '+', "32"), (&diff.changed, '~', "33"), (&diff.removed, '-', "31")];
    for (changes, sign, paint) in parts {
        for Change { kind, name, target, version, size: bytes } in changes {
            let version = version.as_ref().map(|version| format!(" {version}")).unwrap_or_default();
            let bytes = bytes.map(|bytes| format!(" ({})", size(bytes))).unwrap_or_default();
            let target = target.as_ref().map(|target| format!(" for {target}")).unwrap_or_default();
            let line = format!("{sign} {kind} {name}{version}{target}{bytes}");
            let _ = writeln!(text, "{}", painted(&line, paint, color));
        }
    }
    text
}

/// The outcome for programs.
#[must_use]
pub fn json(outcome: &Outcome) -> Value {
    let mut value = json!({
        "channel": outcome.channel,
        "sequence": outcome.sequence,
        "version": outcome.version,
        "commit": outcome.commit,
        "published": outcome.done == Done::Published,
        "unchanged": outcome.done == Done::UpToDate,
        "dry_run": matches!(outcome.done, Done::WouldPublish | Done::WouldRefuse),
        "refused": outcome.done == Done::WouldRefuse,
        "packages": { "total": outcome.packages, "sent": outcome.sent },
        "bytes_sent": outcome.bytes_sent,
        "diff": outcome.diff,
        "lint": outcome.lint,
    });
    if let (Some(verdict), Some(object)) = (&outcome.agreed, value.as_object_mut()) {
        object.insert("agreement".to_owned(), verdict.json());
    }
    value
}

/// A refused release for programs.
#[must_use]
pub fn refusal_json(channel: &ChannelName, sequence: u64, findings: &[Finding]) -> Value {
    json!({ "channel": channel, "sequence": sequence, "published": false, "refused": true, "lint": findings })
}

/// Brokers that do not agree, for programs.
#[must_use]
pub fn disagreement_json(error: &Disagreement) -> Value {
    json!({ "published": error.stands == Stands::Published, "agreement": error.verdict.json() })
}

/// An installed wheel in one line.
#[must_use]
pub fn installed_sentence(installed: &Installed) -> String {
    let Installed { node, name, version, way, .. } = installed;
    match way {
        Way::Already => format!("{node} has {name} {version} already: nothing sent"),
        Way::Upgrade => format!("{node} has {name} {version} now"),
        Way::Carried(carrier) => {
            format!("{node} has {name} {version} now, ordered under the name of {}", carrier.escape_debug())
        }
    }
}

/// An installed wheel for programs.
#[must_use]
pub fn installed_json(installed: &Installed) -> Value {
    let carrier = match &installed.way {
        Way::Carried(carrier) => Some(carrier),
        Way::Already | Way::Upgrade => None,
    };
    json!({
        "node": installed.node,
        "name": installed.name,
        "version": installed.version,
        "already": installed.way == Way::Already,
        "carrier": carrier,
        "bytes_sent": installed.bytes_sent,
    })
}

/// An error with its causes, in one line.
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let _ = write!(text, ": {error}");
        cause = error.source();
    }
    text
}

/// What to do about an error of this crate.
#[must_use]
pub fn hint(error: &anyhow::Error) -> Option<String> {
    if let Some(error) = error.downcast_ref::<PublishError>() {
        return error.hint();
    }
    if let Some(error) = error.downcast_ref::<Disagreement>() {
        return Some(error.hint());
    }
    if let Some(error) = error.downcast_ref::<InstallError>() {
        return error.hint();
    }
    if let Some(error) = error.downcast_ref::<GitError>() {
        return error.hint();
    }
    if let Some(error) = error.downcast_ref::<PushError>() {
        return error.hint();
    }
    if let Some(error) = error.downcast_ref::<RehearsalError>() {
        return error.hint();
    }
    if let Some(error) = error.downcast_ref::<KeysError>() {
        return error.hint();
    }
    if let Some(error) = error.downcast_ref::<StartError>() {
        return error.hint();
    }
    if let Some(error) = error.downcast_ref::<SteerError>() {
        return error.hint();
    }
    if let Some(error) = error.downcast_ref::<RolloutFailure>() {
        return error.hint();
    }
    if let Some(error) = error.downcast_ref::<ClockError>() {
        return error.hint();
    }
    if let Some(error) = error.downcast_ref::<DoctorError>() {
        return error.hint();
    }
    if let Some(error) = error.downcast_ref::<AskError>() {
        return error.hint();
    }
    if let Some(error) = error.downcast_ref::<BrokersError>() {
        return error.hint().map(str::to_owned);
    }
    if let Some(error) = error.downcast_ref::<TrustError>() {
        return error.hint().map(str::to_owned);
    }
    let stopped = error.downcast_ref::<Stopped>()?;
    stopped.hint()
}

/// The exit code that an error of this crate ends with: 3 if all was done and the outcome is not the one hoped for, else 1.
#[must_use]
pub fn exit_code(error: &anyhow::Error) -> u8 {
    let is_unconfirmed = matches!(error.downcast_ref(), Some(InstallError::NotConfirmed { .. }));
    let is_unexpected = matches!(error.downcast_ref(), Some(RehearsalError::NotAsExpected));
    let is_not_done = matches!(error.downcast_ref(), Some(RolloutFailure::NotDone { .. }))
        || matches!(error.downcast_ref(), Some(StartError::Paused { .. }))
        || error.downcast_ref::<NotAll>().is_some()
        || error.downcast_ref::<Unfit>().is_some();
    let published = |error: &Disagreement| error.stands == Stands::Published;
    let is_not_all = match error.downcast_ref() {
        Some(PublishError::Disagreement(error)) => published(error),
        _ => match error.downcast_ref() {
            Some(SteerError::Disagreement(error)) => published(error),
            _ => error.downcast_ref::<Disagreement>().is_some_and(published),
        },
    };
    if is_not_all || is_unconfirmed || is_unexpected || is_not_done { 3 } else { 1 }
}

/// Writes a line to standard error. If nobody reads it any more (`mpypi watch … 2>&1 | head`), that is no error.
pub fn say(line: &str) {
    let _ = writeln!(stderr(), "{line}");
}

/// `text` in a colour (an SGR code), if `color`.
#[must_use]
pub fn painted(text: &str, code: &str, color: bool) -> String {
    match color {
        true => format!("\x1b[{code}m{text}\x1b[0m"),
        false => text.to_owned(),
    }
}

/// Whether colours belong on `stream`: it is a terminal, and NO_COLOR (no-color.org) is not set.
#[must_use]
pub fn wants_color(stream: &impl IsTerminal) -> bool {
    stream.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(done: Done) -> Outcome {
        Outcome {
            channel: ChannelName::new("dev").unwrap(),
            sequence: 2,
            version: "2".into(),
            commit: None,
            done,
            packages: 5,
            sent: 1,
            bytes_sent: 213,
            diff: Diff::default(),
            lint: vec![],
            agreed: None,
        }
    }

    #[test]
    fn an_outcome_is_one_sentence() {
        let text = |done| sentence(&outcome(done));
        assert_eq!(text(Done::Published), "published dev release 2 (version 2): 1 of 5 packages sent, 213 B");
        let of = Outcome {
            commit: Some("4ace2cdc12157f328b86114047a447b87b97a12c".into()),
            ..outcome(Done::Published)
        };
        let expected =
            "published dev release 2 (version 2 of commit 4ace2cdc1215): 1 of 5 packages sent, 213 B";
        assert_eq!(sentence(&of), expected);
        assert_eq!(text(Done::UpToDate), "dev is up to date at release 2: nothing sent");
        assert_eq!(
            text(Done::WouldPublish),
            "would publish dev release 2 (version 2): 1 of 5 packages to send, 213 B"
        );
    }

    #[test]
    fn sizes_are_for_people() {
        assert_eq!(
            [size(0), size(1023), size(1024), size(1_572_864)],
            ["0 B", "1023 B", "1.0 KiB", "1.5 MiB"]
        );
    }

    #[test]
    fn a_diff_has_a_line_for_each_change() {
        let change = |name: &str, version: Option<&str>| Change {
            kind: "wheel".into(),
            name: name.into(),
            target: None,
            version: version.map(Into::into),
            size: Some(2310),
        };
        let changes =
            Diff { added: vec![change("a", Some("1.0"))], changed: vec![change("b", None)], removed: vec![] };
        assert_eq!(diff(&changes, false), "+ wheel a 1.0 (2.3 KiB)\n~ wheel b (2.3 KiB)\n");
        assert_eq!(diff(&changes, true).lines().next(), Some("\x1b[32m+ wheel a 1.0 (2.3 KiB)\x1b[0m"));
    }
}
