//! Which of two versions is the newer one (PEP 440).

use std::cmp::Ordering;

/// What a version is compared by. One that PEP 440 does not know is older than all others.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    epoch: Option<u64>,
    release: Vec<u64>,
    /// `dev` without anything else comes before all pre-releases, the release itself after them.
    pre: (u8, u64),
    post: Option<u64>,
    dev: u64,
    rest: String,
}

impl Key {
    /// The key of `version`.
    #[must_use]
    pub fn of(version: &str) -> Key {
        read(&version.trim().to_ascii_lowercase()).unwrap_or_else(|| Key {
            epoch: None,
            release: Vec::new(),
            pre: (0, 0),
            post: None,
            dev: 0,
            rest: version.to_owned(),
        })
    }

    /// Whether it is one that nobody should get without asking for it.
    #[must_use]
    pub fn is_pre(&self) -> bool {
        self.epoch.is_none() || self.pre.0 < FINAL || self.dev < u64::MAX
    }
}

/// Compares two versions.
#[must_use]
pub fn compare(one: &str, other: &str) -> Ordering {
    Key::of(one).cmp(&Key::of(other))
}

const FINAL: u8 = 4;

fn read(version: &str) -> Option<Key> {
    let version = version.strip_prefix('v').unwrap_or(version);
    let (version, local) = version.split_once('+').unwrap_or((version, ""));
    let (epoch, version) = match version.split_once('!') {
        Some((epoch, version)) => (epoch.parse().ok()?, version),
        None => (0, version),
    };
    let split = |text: &str| text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let mut release = Vec::new();
    let mut rest = version;
    loop {
        let (digits, after) = rest.split_at(split(rest));
        release.push(digits.parse().ok()?);
        match after.strip_prefix('.').filter(|after| after.starts_with(|c: char| c.is_ascii_digit())) {
            Some(after) => rest = after,
            None => {
                rest = after;
                break;
            }
        }
    }
    while release.len() > 1 && release.last() == Some(&0) {
        release.pop();
    }
    let (mut pre, mut post, mut dev) = (None, None, None);
    while !rest.is_empty() {
        let implicit_post = rest.starts_with('-');
        let word = rest.trim_start_matches(['.', '-', '_']);
        let letters = word.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(word.len());
        let (name, after) = word.split_at(letters);
        let after = if name.is_empty() { after } else { after.trim_start_matches(['.', '-', '_']) };
        let (digits, after) = after.split_at(split(after));
        let number = if digits.is_empty() { 0 } else { digits.parse().ok()? };
        match name {
            "a" | "alpha" => pre = Some((1, number)),
            "b" | "beta" => pre = Some((2, number)),
            "rc" | "c" | "pre" | "preview" => pre = Some((3, number)),
            "post" | "rev" | "r" => post = Some(number),
            "" if implicit_post && !digits.is_empty() => post = Some(number),
            "dev" => dev = Some(number),
            _ => return None,
        }
        rest = after;
    }
    let pre = match (pre, post, dev) {
        (Some(pre), ..) => pre,
        (None, None, Some(_)) => (0, 0),
        _ => (FINAL, 0),
    };
    Some(Key { epoch: Some(epoch), release, pre, post, dev: dev.unwrap_or(u64::MAX), rest: local.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_ordered_as_pep_440_says() {
        let ordered = [
            "latest",
            "1.0.dev1",
            "1.0a1",
            "1.0a2.dev3",
            "1.0a2",
            "1.0b1",
            "1.0rc1",
            "1.0",
            "1.0+esp32",
            "1.0.post1",
            "1.1",
            "1.1.1",
            "1.10",
            "2",
            "2024.1",
            "1!0.1",
        ];
        for pair in ordered.windows(2) {
            assert_eq!(compare(pair[0], pair[1]), Ordering::Less, "{pair:?}");
        }
        assert_eq!(compare("1.0", "v1.0.0"), Ordering::Equal);
        assert_eq!(compare("1.0-1", "1.0.post1"), Ordering::Equal);
        let is_pre = |version| Key::of(version).is_pre();
        assert!(is_pre("1.0rc1") && is_pre("1.0.dev1") && is_pre("1.0.post1.dev2") && is_pre("latest"));
        assert!(!is_pre("1.0") && !is_pre("1.0.post1"));
    }
}
