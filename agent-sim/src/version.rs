//! Which of two versions is newer, as the device's local interfaces say it. The channel itself knows only sequences.

use std::cmp::Ordering;

/// Compares two versions of a package: dotted numbers by number, of any length; what follows `-` or a dot and a letter
/// (`2.6.4-pi64`) names a platform and does not count; `a`, `b`, `rc` and `.dev` come before the release, as in PEP
/// 440. What starts with no number (`master`) is newer than every release.
#[must_use]
pub fn compare(one: &str, other: &str) -> Ordering {
    match (Numbers::of(one), Numbers::of(other)) {
        (Some(one), Some(other)) => one.cmp(&other),
        (Some(_), None) => Ordering::Less,
        (None, Some(_)) => Ordering::Greater,
        (None, None) => one.cmp(other),
    }
}

/// Compares two versions of a firmware image: semver 2.0.0, §11, where both are such; as packages otherwise.
#[must_use]
pub fn compare_firmware(one: &str, other: &str) -> Ordering {
    match (semver::Version::parse(one), semver::Version::parse(other)) {
        (Ok(one), Ok(other)) => one.cmp_precedence(&other),
        _ => compare(one, other),
    }
}

/// The numbers of a version, zeros at the end left out, and where it stands beside the release of these numbers.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Numbers {
    release: Vec<u64>,
    before: Before,
}

/// What comes before a release, in its order.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Before {
    Development(u64),
    Alpha(u64),
    Beta(u64),
    Candidate(u64),
    Release,
}

impl Numbers {
    fn of(version: &str) -> Option<Numbers> {
        let version = version.strip_prefix('v').unwrap_or(version);
        let mut release = Vec::new();
        let mut rest = version;
        loop {
            let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
            if end == 0 {
                break;
            }
            release.push(rest[..end].parse().unwrap_or(u64::MAX));
            rest = &rest[end..];
            match rest.strip_prefix('.') {
                Some(next) if next.starts_with(|c: char| c.is_ascii_digit()) => rest = next,
                _ => break,
            }
        }
        if release.is_empty() {
            return None;
        }
        while release.last() == Some(&0) {
            release.pop();
        }
        let before = [".dev", "rc", "a", "b"].into_iter().find_map(|mark| {
            let number = rest.strip_prefix(mark)?;
            let end = number.find(|c: char| !c.is_ascii_digit()).unwrap_or(number.len());
            let number = number[..end].parse().unwrap_or(0);
            Some(match mark {
                ".dev" => Before::Development(number),
                "rc" => Before::Candidate(number),
                "a" => Before::Alpha(number),
                _ => Before::Beta(number),
            })
        });
        Some(Numbers { release, before: before.unwrap_or(Before::Release) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_count_platforms_do_not_and_a_branch_outranks_every_release() {
        let rising =
            ["1.0.0.dev3", "1.0.0a1", "1.0.0rc2", "1.0.0", "1.2", "1.10.0", "2.6.4-pi64", "10", "master"];
        for (index, one) in rising.iter().enumerate() {
            for (other_index, other) in rising.iter().enumerate() {
                assert_eq!(compare(one, other), index.cmp(&other_index), "{one} beside {other}");
            }
        }
        for (one, other) in
            [("2.6.4-pi64", "2.6.4"), ("2.6.4-pi64", "2.6.4-x86"), ("1", "1.0.0"), ("1.0.pi64", "1.0")]
        {
            assert_eq!(compare(one, other), Ordering::Equal, "{one} beside {other}");
        }
        assert_eq!(compare("master", "99999999999999999999.0"), Ordering::Greater);
    }

    #[test]
    fn firmware_goes_by_precedence_of_semver() {
        // The example of semver 2.0.0, §11, with the moving build of projectMM.
        let rising = [
            "1.0.0-alpha",
            "1.0.0-alpha.1",
            "1.0.0-alpha.beta",
            "1.0.0-beta",
            "1.0.0-beta.2",
            "1.0.0-beta.11",
            "1.0.0-rc.1",
            "1.0.0",
            "3.0.0-dev.9",
            "3.0.0-dev.10",
            "3.0.0",
            "3.0.1-dev.1",
        ];
        for pair in rising.windows(2) {
            assert_eq!(compare_firmware(pair[0], pair[1]), Ordering::Less, "{pair:?}");
            assert_eq!(compare_firmware(pair[1], pair[0]), Ordering::Greater, "{pair:?}");
        }
        assert_eq!(compare_firmware("1.0.0+5", "1.0.0+6"), Ordering::Equal);
        assert_eq!(compare_firmware("1.9", "1.10"), Ordering::Less, "what is no semver goes by its numbers");
    }
}
