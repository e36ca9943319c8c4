//! What a channel looks like through each of several addresses, and which of them differs.

use std::collections::BTreeMap;

use bytes::Bytes;
use mpypi_client::{Brokers, Endpoint};
use mpypi_protocol::{ChannelName, Digest, UpdateList};
use tokio::task::JoinSet;

use crate::{
    history,
    keys::Keys,
    link::Link,
    publish::PublishError,
    report::count,
    retained::{self, AskError},
    settle::is_older,
    verify::{Check, verify},
};

/// One thing that was checked, through one address or through all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// The address; `None` of what is so through all of them.
    pub broker: Option<String>,
    /// What.
    pub what: String,
    /// What is wrong, if anything is.
    pub trouble: Option<String>,
}

/// What an address retains of a channel.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Held {
    /// Its list.
    pub list: Option<Bytes>,
    /// The roots, by version.
    pub roots: BTreeMap<u64, Digest>,
    /// The lists that it had, by sequence.
    pub history: BTreeMap<u64, Digest>,
}

/// Checks everything about a channel through every address, and whether they retain the same.
///
/// # Errors
/// It cannot be read through any. What is wrong with it, or with one address of several, is no error, but a [`Finding`].
pub async fn verify_each(
    brokers: &Brokers,
    channel: &ChannelName,
    keys: &Keys,
) -> Result<Vec<Finding>, PublishError> {
    if !brokers.are_several() {
        let checks = verify(brokers, channel, keys).await?;
        let alone = |Check { what, trouble }| Finding { broker: None, what, trouble };
        return Ok(checks.into_iter().map(alone).collect());
    }
    let looks = through_each(brokers, |one| {
        let (channel, keys) = (channel.clone(), keys.clone());
        async move {
            let checks = verify(&one, &channel, &keys).await?;
            Ok((checks, held(&one, &channel).await?))
        }
    });
    let looks = looks.await;
    if looks.iter().all(|(_, look)| look.is_err()) {
        let first = looks.into_iter().find_map(|(_, look)| look.err());
        return Err(first.unwrap_or_else(|| unreachable!("there is at least one broker")));
    }
    let (mut checked, mut seen, mut findings) = (Vec::new(), Vec::new(), Vec::new());
    for (broker, look) in looks {
        match look {
            Ok((checks, held)) => {
                checked.push((broker.clone(), checks));
                seen.push((broker, held));
            }
            Err(error) => findings.push(unreadable(broker, &error)),
        }
    }
    findings.splice(0..0, gather(checked));
    findings.extend(differences(&seen));
    Ok(findings)
}

/// Whether all addresses of several retain the same of a channel: one finding if so, else one for each that differs. Nothing
/// of one alone.
///
/// # Errors
/// It cannot be read through any.
pub async fn compare(brokers: &Brokers, channel: &ChannelName) -> Result<Vec<Finding>, PublishError> {
    if !brokers.are_several() {
        return Ok(Vec::new());
    }
    let looks = through_each(brokers, |one| {
        let channel = channel.clone();
        async move { Ok::<_, PublishError>(held(&one, &channel).await?) }
    });
    let (mut seen, mut findings, mut first) = (Vec::new(), Vec::new(), None);
    for (broker, look) in looks.await {
        match look {
            Ok(held) => seen.push((broker, held)),
            Err(error) => {
                findings.push(unreadable(broker, &error));
                first.get_or_insert(error);
            }
        }
    }
    match first {
        Some(error) if seen.is_empty() => Err(error),
        _ => {
            findings.extend(differences(&seen));
            Ok(findings)
        }
    }
}

/// Does something through every address at the same time; in their order.
pub(crate) async fn through_each<T, E, F>(
    brokers: &Brokers,
    work: impl Fn(Brokers) -> F,
) -> Vec<(String, Result<T, E>)>
where
    T: Send + 'static,
    E: Send + 'static,
    F: Future<Output = Result<T, E>> + Send + 'static,
{
    let mut all = JoinSet::new();
    for (number, endpoint) in brokers.iter().enumerate() {
        let (url, work) = (endpoint.url().to_string(), work(Brokers::from(Endpoint::clone(endpoint))));
        all.spawn(async move { (number, url, work.await) });
    }
    let mut done = Vec::new();
    while let Some(one) = all.join_next().await {
        done.extend(one.ok());
    }
    done.sort_by_key(|(number, ..)| *number);
    done.into_iter().map(|(_, url, result)| (url, result)).collect()
}

/// What an address retains.
async fn held(one: &Brokers, channel: &ChannelName) -> Result<Held, AskError> {
    let mut link = Link::connect(one.first()).await?;
    let (list, roots) = retained::channel(&mut link, channel).await?;
    let history = history::read(&mut link, channel).await?;
    link.close().await;
    let digests = |all: BTreeMap<u64, Bytes>| {
        all.into_iter().map(|(number, payload)| (number, Digest::of(&payload))).collect()
    };
    Ok(Held { list, roots: digests(roots), history: digests(history) })
}

fn unreadable(broker: String, error: &PublishError) -> Finding {
    let trouble = match error {
        PublishError::Ask(AskError::Link(error)) => error.reason(),
        error => error.to_string(),
    };
    Finding { broker: Some(broker), what: "what it retains can be read".to_owned(), trouble: Some(trouble) }
}

/// What was checked through each: once what came out the same through all, and else for each.
fn gather(checked: Vec<(String, Vec<Check>)>) -> Vec<Finding> {
    let mut findings: Vec<Finding> = Vec::new();
    for (number, (broker, checks)) in checked.iter().enumerate() {
        for check in checks {
            let Check { what, trouble } = check;
            let is_common = checked.iter().all(|(_, others)| others.contains(check));
            if is_common && number > 0 {
                continue;
            }
            let broker = (!is_common).then(|| broker.clone());
            findings.push(Finding { broker, what: what.clone(), trouble: trouble.clone() });
        }
    }
    findings
}

/// Which of several addresses retain something else than that with the newest list, and than the others.
#[must_use]
pub fn differences(seen: &[(String, Held)]) -> Vec<Finding> {
    // Of several that are newest, the one that most have.
    let votes = |one: &(String, Held)| seen.iter().filter(|(_, held)| held.list == one.1.list).count();
    let newest = seen.iter().fold(None, |newest: Option<&(String, Held)>, one| match newest {
        Some(newest) if is_older(one.1.list.as_deref(), newest.1.list.as_deref()) => Some(newest),
        Some(newest)
            if !is_older(newest.1.list.as_deref(), one.1.list.as_deref()) && votes(newest) >= votes(one) =>
        {
            Some(newest)
        }
        _ => Some(one),
    });
    let Some((at, newest)) = newest.filter(|_| seen.len() > 1) else { return Vec::new() };
    // What one has, all should have: as most of them do.
    let union = |what: fn(&Held) -> &BTreeMap<u64, Digest>| {
        let mut all: BTreeMap<u64, Digest> = BTreeMap::new();
        let votes = |number: &u64, digest: &Digest| {
            seen.iter().filter(|(_, held)| what(held).get(number) == Some(digest)).count()
        };
        for (number, digest) in seen.iter().flat_map(|(_, held)| what(held)) {
            let leads = all.get(number).is_none_or(|leader| votes(number, digest) > votes(number, leader));
            if leads {
                all.insert(*number, *digest);
            }
        }
        all
    };
    let (roots, history) = (union(|held| &held.roots), union(|held| &held.history));
    let mut findings = Vec::new();
    for (broker, held) in seen {
        let mut troubles = Vec::new();
        if held.list != newest.list {
            let of = |list: Option<&[u8]>| list.map_or_else(|| "nothing".to_owned(), release);
            let theirs = of(newest.list.as_deref());
            troubles.push(match is_older(held.list.as_deref(), newest.list.as_deref()) {
                true => format!("still serves {}, where {at} serves {theirs}", of(held.list.as_deref())),
                false => format!("serves {} with other bytes than {at}", of(held.list.as_deref())),
            });
        }
        for (word, all, own) in [("root", &roots, &held.roots), ("earlier list", &history, &held.history)] {
            let lacks: Vec<u64> = all.keys().filter(|number| !own.contains_key(number)).copied().collect();
            let others: Vec<u64> = own
                .iter()
                .filter(|(number, digest)| all[*number] != **digest)
                .map(|(number, _)| *number)
                .collect();
            troubles.extend(
                lacks.first().map(|first| format!("lacks {}, {first} among them", count(lacks.len(), word))),
            );
            troubles.extend(others.first().map(|first| {
                format!("has {} with other bytes than others, {first} among them", count(others.len(), word))
            }));
        }
        if !troubles.is_empty() {
            let what = "it retains what the others do".to_owned();
            findings.push(Finding { broker: Some(broker.clone()), what, trouble: Some(troubles.join("; ")) });
        }
    }
    if findings.is_empty() {
        let what = format!("{} retain the same list, roots and history", count(seen.len(), "broker"));
        findings.push(Finding { broker: None, what, trouble: None });
    }
    findings
}

/// A list in a few words.
fn release(payload: &[u8]) -> String {
    let list = UpdateList::parse(payload).ok();
    match list.as_ref().and_then(UpdateList::release) {
        Some(release) => match release.created {
            Some(created) => format!("release {} (made {created})", release.sequence),
            None => format!("release {}", release.sequence),
        },
        None => "a list without a release".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(sequence: u64, version: &str) -> Option<Bytes> {
        let text =
            format!(r#"[{{"type":"release","channel":"dev","sequence":{sequence},"version":"{version}"}}]"#);
        Some(text.into())
    }

    fn held(sequence: u64) -> Held {
        let digests = |to| (1..to).map(|number| (number, Digest::of(&[number as u8]))).collect();
        Held { list: list(sequence, "1"), roots: digests(3), history: digests(sequence) }
    }

    fn troubles(seen: [Held; 3]) -> Vec<(Option<String>, Option<String>)> {
        let named: Vec<(String, Held)> = ["a", "b", "c"].into_iter().map(str::to_owned).zip(seen).collect();
        differences(&named).into_iter().map(|finding| (finding.broker, finding.trouble)).collect()
    }

    fn bad(broker: &str, trouble: &str) -> (Option<String>, Option<String>) {
        (Some(broker.to_owned()), Some(trouble.to_owned()))
    }

    #[test]
    fn what_is_the_same_everywhere_is_said_once() {
        assert_eq!(troubles([held(3), held(3), held(3)]), [(None, None)]);
        assert_eq!(differences(&[("a".to_owned(), held(3))]), [], "one alone differs from nobody");
    }

    #[test]
    fn who_serves_an_older_list_is_named_and_what_it_serves() {
        let stale = Held { list: list(2, "1"), ..held(3) };
        let text = "still serves release 2, where a serves release 3";
        assert_eq!(troubles([held(3), stale, held(3)]), [bad("b", text)]);
        let empty = Held { list: None, ..held(3) };
        let text = "still serves nothing, where b serves release 3";
        assert_eq!(troubles([empty, held(3), held(3)]), [bad("a", text)]);
    }

    #[test]
    fn who_lacks_a_root_or_an_earlier_list_or_has_another_is_named() {
        let mut lacking = held(4);
        lacking.roots.remove(&2);
        lacking.history.retain(|number, _| *number == 3);
        let text = "lacks 1 root, 2 among them; lacks 2 earlier lists, 1 among them";
        assert_eq!(troubles([held(4), held(4), lacking]), [bad("c", text)]);
        let mut other = held(4);
        other.history.insert(2, Digest::of(b"forged"));
        other.list = list(4, "2");
        let text = "serves release 4 with other bytes than a; has 1 earlier list with other bytes than others, 2 among them";
        assert_eq!(troubles([held(4), other.clone(), held(4)]), [bad("b", text)]);
        // Whoever is named first is not right for that.
        other.list = list(4, "1");
        let text = "has 1 earlier list with other bytes than others, 2 among them";
        assert_eq!(troubles([other, held(4), held(4)]), [bad("a", text)]);
    }

    #[test]
    fn what_was_checked_through_all_is_said_once_and_else_for_each() {
        let check = |what: &str, trouble: Option<&str>| Check {
            what: what.into(),
            trouble: trouble.map(str::to_owned),
        };
        let of = |name: &str, trouble| (name.to_owned(), vec![check("list", None), check("bytes", trouble)]);
        let finding = |broker: Option<&str>, what: &str, trouble: Option<&str>| Finding {
            broker: broker.map(str::to_owned),
            what: what.into(),
            trouble: trouble.map(str::to_owned),
        };
        let found = gather(vec![of("a", None), of("b", Some("1 missing"))]);
        let expected = [
            finding(None, "list", None),
            finding(Some("a"), "bytes", None),
            finding(Some("b"), "bytes", Some("1 missing")),
        ];
        assert_eq!(found, expected);
    }
}
