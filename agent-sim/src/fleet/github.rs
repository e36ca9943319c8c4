//! What a fleet came to, for a pull request on GitHub: annotations, and a summary of the step.

use std::fmt::Write as _;

use super::report::Report;
use crate::limits;

/// Workflow commands, a line each: GitHub shows them beside the pull request, from either output of a step.
#[must_use]
pub fn annotations(report: &Report<'_>) -> String {
    let mut lines = String::new();
    let nodes = report.metrics.nodes;
    for verdict in report.expectations.iter().filter(|verdict| !verdict.met) {
        lines +=
            &command("error", &format!("fleet: {}", verdict.expected), &format!("found {}", verdict.found));
    }
    match report.good {
        true => {
            let text = format!("{} of {nodes} devices applied the release", report.metrics.applied);
            lines += &command("notice", "fleet: as expected", &text);
        }
        false => {
            for troubled in report.troubled.iter().take(limits::ANNOTATED) {
                let text = format!(
                    "{}\nto see it alone: {} --node {}",
                    troubled.trouble, report.again, troubled.number
                );
                lines += &command("error", &format!("fleet: {}", troubled.device), &text);
            }
        }
    }
    lines
}

/// The summary of a step, in Markdown.
#[must_use]
pub fn summary(report: &Report<'_>) -> String {
    let word = if report.good { "As expected" } else { "Not as expected" };
    let profile = report.profile.map(|profile| format!(", profile {}", cell(profile))).unwrap_or_default();
    let mut text = format!(
        "### {word}: {} devices{profile}, seed {}, {:.1} s\n\n",
        report.metrics.nodes, report.seed, report.seconds
    );
    if !report.expectations.is_empty() {
        text += "| expected | found | |\n|---|---:|---|\n";
        for verdict in &report.expectations {
            let met = if verdict.met { "met" } else { "**not met**" };
            let _ = writeln!(text, "| {} | {} | {met} |", cell(&verdict.expected), cell(&verdict.found));
        }
        text.push('\n');
    }
    text += "| release | applied | failed | rolled back | bytes each | of a full download | slowest |\n";
    text += "|---|---:|---:|---:|---:|---:|---:|\n";
    for release in &report.releases {
        let name = release.sequence.map_or_else(|| release.list.short(), |sequence| sequence.to_string());
        let each = release.wire_bytes / release.applied.max(1) as u64;
        let share = match release.full_bytes {
            0 => "–".to_owned(),
            full => format!("{:.1} %", release.wire_bytes as f64 / full as f64 * 100.0),
        };
        let slowest = release.slowest_seconds.map_or_else(|| "–".to_owned(), |time| format!("{time:.2} s"));
        let _ = writeln!(
            text,
            "| {name} | {} | {} | {} | {each} | {share} | {slowest} |",
            release.applied, release.failed, release.rolled_back
        );
    }
    if !report.troubled.is_empty() {
        text += "\n| device | what became of it | to see it alone |\n|---|---|---|\n";
        for troubled in report.troubled.iter().take(limits::NAMED) {
            let _ = writeln!(
                text,
                "| {} | {} | `{} --node {}` |",
                cell(troubled.device.as_str()),
                cell(&troubled.trouble),
                report.again,
                troubled.number
            );
        }
    }
    text
}

/// A workflow command, escaped as GitHub's own toolkit does.
fn command(kind: &str, title: &str, text: &str) -> String {
    let data = |text: &str| text.replace('%', "%25").replace('\r', "%0D").replace('\n', "%0A");
    let property = |text: &str| data(text).replace(':', "%3A").replace(',', "%2C");
    format!("::{kind} title={}::{}\n", property(title), data(text))
}

/// Text in a cell of a Markdown table.
fn cell(text: &str) -> String {
    let mut cell = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\\' | '|' | '`' | '*' | '_' | '[' | ']' => cell.extend(['\\', c]),
            '<' => cell += "&lt;",
            '&' => cell += "&amp;",
            c if c.is_control() => cell.push(' '),
            c => cell.push(c),
        }
    }
    cell
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_a_device_cannot_become_a_command_or_a_column() {
        assert_eq!(
            command("error", "a:b,c", "50%\n::set-output x"),
            "::error title=a%3Ab%2Cc::50%25%0A::set-output x\n"
        );
        assert_eq!(cell("a|b\n<img>*"), "a\\|b &lt;img>\\*");
    }
}
