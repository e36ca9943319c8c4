//! What a fleet came to, for people: one HTML file that needs nothing else, to be kept with a pipeline's artefacts.

use std::fmt::Write as _;

use super::{
    plot::{self, Series, Unit, bytes, escape},
    report::{Moment, Report},
};
use crate::limits;

/// The phases of a plot, from the bottom, by the words of the JSON.
const PHASES: [&str; 8] =
    ["idle", "confirming", "restarting", "installing", "verifying", "downloading", "rolled_back", "failed"];

const STYLE: &str = include_str!("report.css");

/// The page.
#[must_use]
pub fn page(report: &Report<'_>) -> String {
    let (class, word) = if report.good { ("good", "As expected") } else { ("bad", "Not as expected") };
    let profile = report.profile.map(|name| format!(", profile <b>{}</b>", escape(name))).unwrap_or_default();
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width\">\n<title>{word}: {nodes} devices</title>\n\
         <style>\n{STYLE}</style>\n<body>\n<h1 class=\"{class}\">{word}</h1>\n\
         <p><b>{nodes}</b> devices{profile}, seed <b>{seed}</b>, <b>{seconds:.1} s</b></p>\n",
        nodes = report.metrics.nodes,
        seed = report.seed,
        seconds = report.seconds,
    );
    for section in [numbers, releases, over_time, connections, cohorts, errors, intruder, troubled] {
        page += &section(report);
    }
    page + "</body>\n</html>\n"
}

fn section(title: &str, body: &str) -> String {
    format!("<section>\n<h2>{title}</h2>\n{body}\n</section>\n")
}

fn numbers(report: &Report<'_>) -> String {
    let metrics = &report.metrics;
    let mut body = String::new();
    if !report.expectations.is_empty() {
        body += "<table><tr><th>expected<th>found<th></tr>";
        for verdict in &report.expectations {
            let (class, word) = if verdict.met { ("good", "met") } else { ("bad", "not met") };
            let _ = write!(
                body,
                "<tr><td>{}<td class=\"number\">{}<td class=\"{class}\">{word}</tr>",
                escape(&verdict.expected),
                escape(&verdict.found)
            );
        }
        body += "</table>";
    }
    let blows = &report.blows;
    let facts = [
        ("applied", metrics.applied as u64),
        ("failed", metrics.failed as u64),
        ("rolled back", metrics.rolled_back as u64),
        ("bricked", metrics.bricked as u64),
        ("unfinished", metrics.unfinished as u64),
        ("power cuts", blows.power_cuts),
        ("crashes", blows.crashes),
        ("naps", blows.naps),
        ("connections", blows.connections),
    ];
    body += "<ul class=\"facts\">";
    for (name, count) in facts {
        let _ = write!(body, "<li><b>{count}</b> {name}</li>");
    }
    section("In numbers", &(body + "</ul>"))
}

fn releases(report: &Report<'_>) -> String {
    let mut body = String::from(
        "<p>Bytes at the socket, of each device that applied it, beside a full download.</p>\
         <table><tr><th>release<th>applied<th>bytes each<th>full<th><th>share<th>median<th>95 %<th>slowest<th>tries</tr>",
    );
    let time = |time: Option<f64>| time.map_or_else(|| "–".to_owned(), |time| format!("{time:.2} s"));
    for release in &report.releases {
        let name = release.sequence.map_or_else(|| release.list.short(), |sequence| sequence.to_string());
        let version = release.version.map(|version| format!(" ({})", escape(version))).unwrap_or_default();
        let (wire, full) = (release.wire_bytes as f64, release.full_bytes as f64);
        let each = |sum: f64| bytes(sum / release.applied.max(1) as f64);
        let share = if full > 0.0 { format!("{:.1} %", wire / full * 100.0) } else { "–".to_owned() };
        // What is sent beside the packages themselves may make it more than all.
        let bar = plot::parts(full.max(wire), &[("wire", wire)]);
        let _ = write!(
            body,
            "<tr><td>{name}{version}<td class=\"number\">{}<td class=\"number\">{}<td class=\"number\">{}<td>{bar}\
             <td class=\"number\">{share}<td class=\"number\">{}<td class=\"number\">{}<td class=\"number\">{}\
             <td class=\"number\">{}</tr>",
            release.applied,
            each(wire),
            each(full),
            time(release.median_seconds),
            time(release.p95_seconds),
            time(release.slowest_seconds),
            release.attempts,
        );
    }
    section("Releases", &(body + "</table>"))
}

fn over_time(report: &Report<'_>) -> String {
    let times: Vec<_> = report.samples.iter().map(|moment| moment.seconds).collect();
    let values = |value: &dyn Fn(&Moment) -> f64| report.samples.iter().map(value).collect::<Vec<_>>();
    let marks: Vec<_> = report
        .releases
        .iter()
        .map(|release| {
            let name = release.sequence.map_or_else(|| release.list.short(), |sequence| sequence.to_string());
            (release.seen_seconds, format!("release {name}"))
        })
        .collect();
    let applied = |moment: &Moment| moment.applied as f64;
    let online = |moment: &Moment| moment.online as f64;
    let convergence = [
        Series { name: "on the newest release", class: "applied", values: values(&applied) },
        Series { name: "connected", class: "online", values: values(&online) },
    ];
    let phases: Vec<_> = PHASES
        .into_iter()
        .map(|phase| Series {
            name: match phase {
                "rolled_back" => "rolled back",
                phase => phase,
            },
            class: phase,
            values: values(&|moment| moment.phases.get(phase).copied().unwrap_or_default() as f64),
        })
        .filter(|series| series.values.iter().any(|value| *value > 0.0))
        .collect();
    let traffic = [
        Series { name: "at the sockets", class: "wire", values: values(&|moment| moment.wire_bytes as f64) },
        Series { name: "of packages", class: "applied", values: values(&|moment| moment.bytes as f64) },
    ];
    let retries =
        [Series { name: "retries", class: "failed", values: values(&|moment| moment.retries as f64) }];
    [
        (
            "Convergence",
            plot::lines(
                "Devices on the newest release, over time",
                &times,
                &convergence,
                Unit::Plain,
                &marks,
            ),
        ),
        ("Phases", plot::stack("Devices in each phase, over time", &times, &phases, &marks)),
        ("Bytes received", plot::lines("Bytes received, over time", &times, &traffic, Unit::Bytes, &marks)),
        (
            "Retries",
            plot::lines(
                "Tries of a release beyond the first, over time",
                &times,
                &retries,
                Unit::Plain,
                &marks,
            ),
        ),
    ]
    .map(|(title, plot)| section(title, &plot))
    .concat()
}

fn connections(report: &Report<'_>) -> String {
    let comebacks = &report.reconnects;
    if comebacks.count == 0 {
        return String::new();
    }
    let columns: Vec<_> =
        comebacks.after.iter().map(|after| (format!("{} s", after.from_seconds), after.count)).collect();
    let text = format!(
        "<p>How long devices were without a connection that broke: {} times. At most {} came back within {} ms.</p>",
        comebacks.count,
        comebacks.crowd,
        limits::CROWD.as_millis()
    );
    section("Reconnects", &(text + &plot::columns("Reconnects, by time without a connection", &columns)))
}

fn cohorts(report: &Report<'_>) -> String {
    let mut body = String::from(
        "<table><tr><th><th>devices<th><th>applied<th>failed<th>rolled back<th>bricked<th>unfinished<th>median</tr>",
    );
    let mut last = "";
    for cohort in &report.cohorts {
        if cohort.by != last {
            let _ = write!(body, "<tr><th colspan=\"9\" class=\"by\">{}</tr>", escape(cohort.by));
            last = cohort.by;
        }
        let counts = [cohort.applied, cohort.failed, cohort.rolled_back, cohort.bricked, cohort.unfinished];
        let classes = ["applied", "failed", "rolled_back", "bricked", "unfinished"];
        let parts: Vec<_> = classes.into_iter().zip(counts.map(|count| count as f64)).collect();
        let bar = plot::parts(cohort.nodes as f64, &parts);
        let _ = write!(body, "<tr><td>{}<td class=\"number\">{}<td>{bar}", escape(cohort.name), cohort.nodes);
        for count in counts {
            let _ = write!(body, "<td class=\"number\">{count}");
        }
        let median = cohort.median_seconds.map_or_else(|| "–".to_owned(), |time| format!("{time:.2} s"));
        let _ = write!(body, "<td class=\"number\">{median}</tr>");
    }
    section("Cohorts", &(body + "</table>"))
}

fn errors(report: &Report<'_>) -> String {
    if report.errors.is_empty() {
        return String::new();
    }
    let mut body = String::from("<table><tr><th>reason<th>releases</tr>");
    for (error, count) in &report.errors {
        let _ = write!(body, "<tr><td>{}<td class=\"number\">{count}</tr>", escape(error));
    }
    section("What failed, in the end", &(body + "</table>"))
}

fn intruder(report: &Report<'_>) -> String {
    if report.attacks.is_empty() {
        return String::new();
    }
    let mut body = String::from("<table><tr><th>an intruder’s<th>times<th></tr>");
    for (attack, count) in &report.attacks {
        let _ = write!(body, "<tr><td>{}<td class=\"number\">{count}<td></tr>", escape(attack));
    }
    body += "<tr><th>refused for<th>times<th></tr>";
    for (word, count) in report.refusals {
        let _ = write!(body, "<tr><td>{}<td class=\"number\">{count}<td></tr>", escape(word));
    }
    section("Attacks", &(body + "</table>"))
}

fn troubled(report: &Report<'_>) -> String {
    if report.troubled.is_empty() {
        return String::new();
    }
    let again = escape(&report.again);
    let mut body = String::from("<table><tr><th>device<th>what became of it<th>to see it alone</tr>");
    for troubled in report.troubled.iter().take(limits::NAMED) {
        let _ = write!(
            body,
            "<tr><td>{}<td>{}<td><code>{again} --node {}</code></tr>",
            escape(troubled.device.as_str()),
            escape(&troubled.trouble),
            troubled.number
        );
    }
    body += "</table>";
    if let Some(more @ 1..) = report.troubled.len().checked_sub(limits::NAMED) {
        let _ = write!(body, "<p>… and {more} more</p>");
    }
    section("Devices in trouble", &body)
}
