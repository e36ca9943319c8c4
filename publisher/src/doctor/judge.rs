//! What was seen → verdicts. No I/O, no clock.
//!
//! `no` says that something is missing without which mpypi does not work; `weak`, that it works and somebody should know. Only
//! `no` makes a broker unfit.

use std::{collections::BTreeSet, fmt};

use mpypi_protocol::limits::PACKAGE;
use serde::{Serialize, Serializer};

use super::{
    Address, Agreement, Cleared, Denied, Engine, Expiry, Fate, Greeting, Largest, Live, Observations,
    Wildcard,
};
use crate::{limits, link::Mqtt, report::size};

/// What is judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Check {
    /// Whether each address lets us in.
    Reach,
    /// MQTT 3.1.1.
    Four,
    /// MQTT 5.
    Five,
    /// What it says of itself.
    Greeting,
    /// Whether it retains, and serves what it retains by its topic.
    Retained,
    /// Whether to the byte.
    Bytes,
    /// QoS 1, both ways.
    Confirmed,
    /// Dots in topics.
    Dots,
    /// Spaces in topics.
    Spaces,
    /// Retained messages by a wildcard.
    Wildcard,
    /// The largest retained message.
    Largest,
    /// Messages with an end.
    Expiry,
    /// Clearing.
    Clear,
    /// What becomes of what this user may not write.
    Denied,
    /// Whether several addresses show the same.
    Agreement,
    /// Its clock.
    Clock,
}

impl Check {
    /// Its name, in tables and for programs.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Check::Reach => "reach",
            Check::Four => "mqtt-3.1.1",
            Check::Five => "mqtt-5",
            Check::Greeting => "greeting",
            Check::Retained => "retained",
            Check::Bytes => "bytes",
            Check::Confirmed => "qos-1",
            Check::Dots => "dots",
            Check::Spaces => "spaces",
            Check::Wildcard => "wildcard",
            Check::Largest => "largest",
            Check::Expiry => "expiry",
            Check::Clear => "clear",
            Check::Denied => "denied",
            Check::Agreement => "agreement",
            Check::Clock => "clock",
        }
    }
}

impl Serialize for Check {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// It works; somebody should know.
    Weak,
    /// mpypi does not work there.
    No,
    /// It cannot be told.
    Unknown,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Verdict::Ok => "ok",
            Verdict::Weak => "weak",
            Verdict::No => "no",
            Verdict::Unknown => "?",
        })
    }
}

/// One line of the verdict.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Row {
    /// What was judged.
    pub check: Check,
    /// How it came out.
    pub verdict: Verdict,
    /// Why, in a line.
    pub why: String,
    /// What to do about it.
    pub hint: Option<String>,
}

impl Row {
    fn new(check: Check, verdict: Verdict, why: impl Into<String>) -> Row {
        Row { check, verdict, why: why.into(), hint: None }
    }

    fn hint(self, hint: impl Into<String>) -> Row {
        Row { hint: Some(hint.into()), ..self }
    }
}

/// The verdict on what was seen, of an `engine` that is known, or not.
#[must_use]
pub fn judge(seen: &Observations, engine: Option<Engine>) -> Vec<Row> {
    let address = &seen.addresses[seen.examined];
    let mut rows = Vec::new();
    rows.extend((seen.addresses.len() > 1).then(|| reach(&seen.addresses)));
    rows.extend([four(address), five(address)]);
    rows.extend(seen.greeting.as_ref().map(greeting));
    rows.push(retained(&seen.plain));
    rows.extend(bytes(&seen.plain));
    rows.push(confirmed(&seen.live));
    rows.push(dots(&seen.dots));
    rows.push(spaces(&seen.spaces));
    rows.push(wildcard(seen.wildcard, &seen.plain, engine));
    rows.push(largest(&seen.largest, &seen.plain, seen.greeting.as_ref()));
    rows.push(expiry(seen.expiry, &seen.plain, address));
    rows.push(clear(&seen.cleared));
    rows.push(denied(&seen.denied));
    rows.extend(seen.agreement.as_ref().map(|agreement| agreed(agreement, &seen.addresses)));
    rows.push(clock(seen.clock));
    for row in &mut rows {
        let setting = engine.and_then(|engine| engine.setting(row.check));
        if let Some(setting) = setting.filter(|_| matches!(row.verdict, Verdict::Weak | Verdict::No)) {
            row.hint = Some(match row.hint.take() {
                Some(hint) => format!("{setting}; {hint}"),
                None => setting.to_owned(),
            });
        }
    }
    rows
}

fn reach(addresses: &[Address]) -> Row {
    let shut: Vec<String> = addresses
        .iter()
        .filter(|address| !address.is_open())
        .map(|address| {
            format!("{}: {}", address.url, address.four.as_deref().or(address.five.as_deref()).unwrap_or(""))
        })
        .collect();
    match shut.is_empty() {
        true => Row::new(Check::Reach, Verdict::Ok, format!("all {} addresses let us in", addresses.len())),
        false => Row::new(Check::Reach, Verdict::No, shut.join("; "))
            .hint("start or restart that node, or leave its address out"),
    }
}

fn four(address: &Address) -> Row {
    match &address.four {
        None => Row::new(Check::Four, Verdict::Ok, "spoken, as devices do"),
        Some(reason) => Row::new(Check::Four, Verdict::No, reason)
            .hint("the MicroPython agent and Mpy-BLOX speak MQTT 3.1.1: allow it"),
    }
}

fn five(address: &Address) -> Row {
    match &address.five {
        None => Row::new(Check::Five, Verdict::Ok, "spoken: refusals have reasons"),
        Some(reason) => Row::new(Check::Five, Verdict::Weak, format!("not spoken ({reason})"))
            .hint("nothing needs it; but refusals have no reasons, so read back what is published"),
    }
}

/// What it says of itself, and whether that is enough.
fn greeting(greeting: &Greeting) -> Row {
    let Greeting {
        maximum_packet_size,
        maximum_qos,
        retain_available,
        server_keep_alive,
        topic_alias_maximum,
        receive_maximum,
        wildcard_subscription_available,
        shared_subscription_available,
        ..
    } = greeting;
    let is_off = |available: &Option<bool>| *available == Some(false);
    let mut said = vec![match maximum_packet_size {
        Some(bytes) => format!("packets up to {}", size((*bytes).into())),
        None => "packets of any size".to_owned(),
    }];
    said.push(format!("QoS up to {}", maximum_qos.unwrap_or(2)));
    said.push(format!("{} messages at a time", receive_maximum.unwrap_or(u16::MAX)));
    said.push(format!("{} topic aliases", topic_alias_maximum.unwrap_or(0)));
    said.extend(server_keep_alive.map(|seconds| format!("a keep-alive of {seconds} s")));
    let lacks: Vec<&str> = [
        (is_off(retain_available), "retained messages"),
        (*maximum_qos == Some(0), "QoS 1"),
        (is_off(wildcard_subscription_available), "wildcards"),
        (is_off(shared_subscription_available), "shared subscriptions"),
    ]
    .iter()
    .filter_map(|(is_lacking, what)| is_lacking.then_some(*what))
    .collect();
    if !lacks.is_empty() {
        said.push(format!("no {}", lacks.join(", no ")));
    }
    let why = said.join(", ");
    // Shared subscriptions are nothing of ours.
    match (is_off(retain_available) || *maximum_qos == Some(0), is_off(wildcard_subscription_available)) {
        (true, _) => Row::new(Check::Greeting, Verdict::No, why)
            .hint("mpypi needs retained messages and QoS 1: allow them, or take another broker"),
        (false, true) => Row::new(Check::Greeting, Verdict::Weak, why)
            .hint("`mpypi status`, rollouts and the dashboard ask for nodes by wildcard: allow them"),
        (false, false) => Row::new(Check::Greeting, Verdict::Ok, why),
    }
}

/// Whether anything is kept, where packages are.
fn retained(plain: &Fate) -> Row {
    let no = |why: String| Row::new(Check::Retained, Verdict::No, why);
    let login = "log in as a user who may write packages: `--broker mqtt://user:password@host:port`; \
                 for a device's user, that this fails is as it should be";
    match plain {
        Fate::Kept => Row::new(Check::Retained, Verdict::Ok, "kept, and served to who asks by its topic"),
        Fate::Garbled => Row::new(Check::Retained, Verdict::Ok, "kept, but see below"),
        Fate::Renamed { topic } => no(format!("comes back under another topic, `{topic}`"))
            .hint("packages are asked for by their topics: take another broker"),
        Fate::Refused { reason } => no(format!("this user may not write packages: {reason}")).hint(login),
        Fate::Closed { reason } => {
            no(format!("a package is answered by the end of the connection: {reason}"))
                .hint(format!("if that is for lack of rights, {login}; the broker's log says"))
        }
        Fate::Dropped => no("a package is acknowledged, and is not there".to_owned()).hint(format!(
            "brokers do so where a user may not write: {login}; if this one may, the broker does not retain"
        )),
        Fate::Unreadable => no("this user may not read packages".to_owned())
            .hint("publishing reads back what it publishes: let this user read `mpypi/#`"),
        Fate::Silent => no("a package is not answered in time".to_owned()).hint("see the broker's log"),
        Fate::Untried => Row::new(Check::Retained, Verdict::Unknown, UNTRIED),
    }
}

/// Why what follows was not tried.
const UNTRIED: &str = "not tried: nothing is kept";

fn bytes(plain: &Fate) -> Option<Row> {
    match plain {
        Fate::Kept => Some(Row::new(Check::Bytes, Verdict::Ok, "all 256 of them come back as they were")),
        Fate::Garbled => Some(
            Row::new(Check::Bytes, Verdict::No, "what comes back is not what was published")
                .hint("something rewrites payloads there, as a plugin or a bridge may: packages have to come through"),
        ),
        _ => None,
    }
}

fn confirmed(live: &Live) -> Row {
    let row = |verdict, why: &str| Row::new(Check::Confirmed, verdict, why);
    match live {
        Live::Came { qos: 1 } => row(Verdict::Ok, "published, asked for and delivered at QoS 1"),
        Live::Came { .. } => row(Verdict::Weak, "published at QoS 1, delivered at QoS 0").hint(
            "agents ask at QoS 0; who listens for orders may miss one and is told again by `mpypi status`",
        ),
        Live::Missing { reason } => {
            let why = reason.as_ref().map_or_else(String::new, |reason| format!(": {reason}"));
            row(Verdict::No, &format!("who listens at QoS 1 does not get what is published{why}"))
                .hint("a change of a channel would not reach devices that are connected")
        }
        Live::Untried => row(Verdict::Unknown, UNTRIED),
    }
}

/// How a fate reads where another topic was tried, `None` if all is well.
fn trouble(fate: &Fate) -> Option<String> {
    Some(match fate {
        Fate::Kept => return None,
        Fate::Dropped => "acknowledged, and not kept".to_owned(),
        Fate::Garbled => "kept with other bytes".to_owned(),
        Fate::Renamed { topic } => format!("comes back as `{topic}`"),
        Fate::Refused { reason } => format!("refused: {reason}"),
        Fate::Closed { reason } => format!("the connection ends: {reason}"),
        Fate::Unreadable => "may not be read".to_owned(),
        Fate::Silent => "not answered in time".to_owned(),
        Fate::Untried => UNTRIED.to_owned(),
    })
}

fn dots(fate: &Fate) -> Row {
    match (fate, trouble(fate)) {
        (Fate::Untried, _) => Row::new(Check::Dots, Verdict::Unknown, UNTRIED),
        (_, None) => Row::new(Check::Dots, Verdict::Ok, "kept as they are"),
        (_, Some(why)) => Row::new(Check::Dots, Verdict::No, why)
            .hint("topics of files have dots, as `main.py`: NATS takes them from 2.10 on, RabbitMQ does not"),
    }
}

fn spaces(fate: &Fate) -> Row {
    match (fate, trouble(fate)) {
        (Fate::Untried, _) => Row::new(Check::Spaces, Verdict::Unknown, UNTRIED),
        (_, None) => Row::new(Check::Spaces, Verdict::Ok, "kept as they are"),
        (_, Some(why)) => Row::new(Check::Spaces, Verdict::Weak, why)
            .hint("files whose paths have spaces cannot be published there: rename them"),
    }
}

fn wildcard(Wildcard { there, came, accepted }: Wildcard, plain: &Fate, engine: Option<Engine>) -> Row {
    let row = |verdict, why: String| Row::new(Check::Wildcard, verdict, why);
    let needed = "`mpypi status`, rollouts and the dashboard ask for nodes by wildcard";
    match (accepted, came) {
        _ if *plain != Fate::Kept => row(Verdict::Unknown, UNTRIED.to_owned()),
        (false, _) => row(Verdict::Weak, "the filter is refused".to_owned())
            .hint("let this user read `mpypi/#`: tools that show packages ask so; agents do not"),
        (true, 0) if there > 0 => row(Verdict::No, format!("none of {there} messages comes"))
            .hint(format!("{needed}: take another broker")),
        (true, came) if came < there => {
            row(Verdict::Weak, format!("{came} of {there} messages come, the rest is dropped")).hint(format!(
                "raise what may wait for a client: {needed}; agents ask for packages one by one"
            ))
        }
        // Measured: `max_pending` is 64 MB, and who is owed more is cut off.
        _ if engine == Some(Engine::Nats) => {
            row(Verdict::Weak, format!("all {there} messages come; of more than 64 MB together none would"))
                .hint("ask for packages by their topics, as agents do")
        }
        _ => row(Verdict::Ok, format!("all {there} messages come")),
    }
}

/// How large packages may be; `greeting` may say so to the publisher, too.
fn largest(largest: &Largest, plain: &Fate, greeting: Option<&Greeting>) -> Row {
    let Largest { kept, limit, lost } = largest;
    let row = |verdict, why: String| Row::new(Check::Largest, verdict, why);
    if *plain != Fate::Kept {
        return row(Verdict::Unknown, UNTRIED.to_owned());
    }
    let Some((bytes, fate)) = lost else {
        return row(Verdict::Ok, format!("{} come back; more was not tried", size(*limit)));
    };
    let says_so = greeting.is_some_and(|greeting| {
        greeting.maximum_packet_size.is_some_and(|said| u64::from(said) <= *bytes)
            || greeting.user_properties.iter().any(|(key, _)| key == mpypi_protocol::greeting::PACKAGE)
    });
    let how = trouble(fate).unwrap_or_default();
    let why = format!("{} come back; {}: {how}", size(*kept), size(*bytes));
    match *kept {
        kept if kept < limits::DOCTOR_LEAST => row(Verdict::No, why).hint(format!(
            "mpypi needs {} at least, and lists of large channels more",
            size(limits::DOCTOR_LEAST)
        )),
        kept if kept < PACKAGE => row(Verdict::Weak, why).hint(match says_so {
            true => "larger packages go out in chunks, which Mpy-BLOX does not read".to_owned(),
            false => format!(
                "publish with `--max-packet {}K`: larger packages go out in chunks, which Mpy-BLOX does not read",
                kept / 1024
            ),
        }),
        _ => row(Verdict::Ok, why),
    }
}

fn expiry(expiry: Option<Expiry>, plain: &Fate, address: &Address) -> Row {
    let row = |verdict, why: String| Row::new(Check::Expiry, verdict, why);
    let weak = |why: &str| {
        row(Verdict::Weak, why.to_owned())
            .hint("nothing of mpypi needs it; whoever publishes with an expiry, as Mpy-BLOX's script can, should know")
    };
    let Some(Expiry { asked, left, kept, gone }) = expiry else {
        return match (plain, &address.five) {
            (_, Some(_)) => row(Verdict::Unknown, "only MQTT 5 has it".to_owned()),
            (Fate::Kept, None) => row(Verdict::Unknown, "it could not be tried".to_owned()),
            (_, None) => row(Verdict::Unknown, UNTRIED.to_owned()),
        };
    };
    match (kept, gone, left) {
        (false, ..) => weak("what was to be kept for minutes is gone at once"),
        (_, false, _) => weak("what was to be gone after a second is still there"),
        (.., None) => weak("messages end in time, but do not say how long they have left"),
        (.., Some(left)) if left >= asked => {
            weak("messages end in time, but what they have left does not count down")
        }
        (.., Some(_)) => row(Verdict::Ok, "messages end in time, and say how long they have left".to_owned()),
    }
}

fn clear(cleared: &Cleared) -> Row {
    let row = |verdict, why: String| Row::new(Check::Clear, verdict, why);
    let hint = "old packages and nodes would stay for ever: the broker has to take empty retained messages";
    match cleared {
        Cleared::Gone => row(Verdict::Ok, "an empty message removes what was there".to_owned()),
        Cleared::Still => {
            row(Verdict::No, "what an empty message should remove is still there".to_owned()).hint(hint)
        }
        Cleared::Refused { reason } => {
            row(Verdict::No, format!("an empty message is not taken: {reason}")).hint(hint)
        }
        Cleared::Untried => row(Verdict::Unknown, UNTRIED.to_owned()),
    }
}

fn denied(seen: &[(Mqtt, Denied)]) -> Row {
    let says = |(mqtt, denied): &(Mqtt, Denied)| {
        let what = match denied {
            Denied::Refused { reason } => format!("refused ({reason})"),
            Denied::Closed { reason } => format!("the connection ends ({reason})"),
            Denied::Dropped => "acknowledged all the same, and does not come back".to_owned(),
            Denied::Nowhere => "this user may write wherever it was tried".to_owned(),
            Denied::Unknown => "acknowledged; whether it is kept cannot be read".to_owned(),
        };
        format!("{mqtt}: {what}")
    };
    let is_known = |(_, denied): &&(Mqtt, Denied)| !matches!(denied, Denied::Nowhere | Denied::Unknown);
    let known: Vec<_> = seen.iter().filter(is_known).collect();
    if known.is_empty() {
        let is_anywhere = seen.iter().all(|(_, denied)| *denied == Denied::Nowhere) && !seen.is_empty();
        let why = match is_anywhere {
            true => "cannot tell: this user may write wherever it was tried",
            false => "cannot tell: what this user may not write it may not read",
        };
        return Row::new(Check::Denied, Verdict::Unknown, why)
            .hint("try as a user with fewer rights, a device's: it must not be able to write packages");
    }
    let why = known.into_iter().map(says).collect::<Vec<_>>().join("; ");
    match seen.iter().any(|(_, denied)| *denied == Denied::Dropped) {
        true => Row::new(Check::Denied, Verdict::Weak, why)
            .hint("an acknowledgement proves nothing there: `mpypi publish` reads back; scripts of yours should, too"),
        false => Row::new(Check::Denied, Verdict::Ok, why),
    }
}

/// Which addresses do not show what was published at others.
fn agreed(Agreement { within, published, seen }: &Agreement, addresses: &[Address]) -> Row {
    let url = |number: &usize| addresses.get(*number).map_or("", |address| address.url.as_str());
    let urls = |numbers: &[usize]| numbers.iter().map(url).collect::<Vec<_>>().join(", ");
    let numbers: BTreeSet<usize> = published.keys().copied().collect();
    let taken: Vec<usize> =
        numbers.iter().copied().filter(|number| published[number] == Fate::Kept).collect();
    let misses = |at: usize, of: usize| seen.get(&(at, of)).is_none_or(Option::is_none);
    let mut odd = Vec::new();
    for at in &numbers {
        let others: Vec<usize> = taken.iter().copied().filter(|of| of != at).collect();
        let lacks: Vec<usize> = others.iter().copied().filter(|of| misses(*at, *of)).collect();
        match &published[at] {
            Fate::Kept => {}
            fate => odd.push(format!("{}: {}", url(at), trouble(fate).unwrap_or_default())),
        }
        // Where others agree among themselves, who shows none of theirs is the stale one.
        let agree = others.iter().any(|one| others.iter().any(|other| one != other && !misses(*one, *other)));
        if !lacks.is_empty() && lacks.len() == others.len() && agree {
            odd.push(format!("{} is stale: it shows nothing of what is published at the others", url(at)));
        } else if !lacks.is_empty() {
            odd.push(format!("{} does not show what is published at {}", url(at), urls(&lacks)));
        }
    }
    let slowest = seen.values().flatten().max();
    let shut = addresses.iter().filter(|address| !address.is_open()).count();
    let within = if *within >= 1000 { format!("{} s", within / 1000) } else { format!("{within} ms") };
    if !odd.is_empty() {
        return Row::new(Check::Agreement, Verdict::No, format!("{} (waited for {within})", odd.join("; ")))
            .hint("are these nodes of one cluster? If so, restart the one that does not show it: it may be frozen");
    }
    let all = numbers.len();
    match (shut, slowest) {
        (0, Some(slowest)) => Row::new(
            Check::Agreement,
            Verdict::Ok,
            format!("each of {all} shows what is published at the others, after {slowest} ms at most"),
        ),
        (_, Some(slowest)) if all > 1 => Row::new(
            Check::Agreement,
            Verdict::Weak,
            format!("the {all} that can be reached agree, after {slowest} ms at most"),
        ),
        _ => Row::new(Check::Agreement, Verdict::Unknown, "fewer than two addresses let us in"),
    }
}

fn clock(ahead: Option<i64>) -> Row {
    let row = |verdict, why: String| Row::new(Check::Clock, verdict, why);
    match ahead {
        None => row(Verdict::Unknown, "it does not say what time it is".to_owned()),
        Some(ahead) if ahead.abs() <= limits::DOCTOR_CLOCK => {
            row(Verdict::Ok, format!("{} s from ours", ahead.abs()))
        }
        Some(ahead) => {
            let side = if ahead > 0 { "ahead of" } else { "behind" };
            row(Verdict::Weak, format!("{} s {side} ours", ahead.abs()))
                .hint("expiry of messages follows the broker's clock: set one of them by NTP")
        }
    }
}

/// A broker is not fit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{brokers} is not fit for mpypi: {}", .failed.join(", "))]
pub struct Unfit {
    /// Which; all nodes, of a cluster.
    pub brokers: String,
    /// The checks that it fails, by their names.
    pub failed: Vec<&'static str>,
}

/// Fails if a broker of which `rows` is the verdict is not fit.
///
/// # Errors
/// [`Unfit`]
pub fn expect_fit(brokers: &str, rows: &[Row]) -> Result<(), Unfit> {
    let failed = rows.iter().filter(|row| row.verdict == Verdict::No).map(|row| row.check.name());
    let failed: Vec<_> = failed.collect();
    match failed.is_empty() {
        true => Ok(()),
        false => Err(Unfit { brokers: brokers.to_owned(), failed }),
    }
}

#[cfg(test)]
mod tests;
