//! Which bytes of a file are asked for (RFC 9110, 14).

use std::ops::Range;

/// Ranges that are answered one by one; who asks for more gets all.
const MOST: usize = 16;

/// What a `Range` header comes to, for a file of known length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Asked {
    /// All of it: the header says nothing that is to be heeded.
    All,
    /// These bytes, in this order; at least one range, none empty.
    Parts(Vec<Range<u64>>),
    /// Nothing that the file has.
    Nothing,
}

/// Reads a `Range` header for a file of `len` bytes.
#[must_use]
pub fn read(header: &str, len: u64) -> Asked {
    // 14.1: range units are case-insensitive; 14.2: what is not understood is ignored.
    let Some((unit, set)) = header.split_once('=') else { return Asked::All };
    if !unit.trim().eq_ignore_ascii_case("bytes") {
        return Asked::All;
    }
    let mut parts = Vec::new();
    let mut count = 0;
    for spec in set.split(',').map(str::trim).filter(|spec| !spec.is_empty()) {
        count += 1;
        match range(spec, len) {
            None => return Asked::All,
            Some(range) if range.is_empty() => {}
            Some(range) => parts.push(range),
        }
        if count > MOST {
            return Asked::All;
        }
    }
    // 14.2: many small or overlapping ranges are signs of a broken client, or an attack.
    let total: u64 = parts.iter().map(|part| part.end - part.start).sum();
    match parts.len() {
        0 if count == 0 => Asked::All,
        0 => Asked::Nothing,
        2.. if total > len => Asked::All,
        _ => Asked::Parts(parts),
    }
}

/// One range, empty if the file has none of it; `None` if it is none.
fn range(spec: &str, len: u64) -> Option<Range<u64>> {
    let (first, last) = spec.split_once('-')?;
    let number = |text: &str| {
        let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        // A number larger than any file is still a number.
        is_number.then(|| text.parse().unwrap_or(u64::MAX))
    };
    match (first.trim(), last.trim()) {
        ("", last) => Some(len.saturating_sub(number(last)?)..len),
        (first, "") => Some(number(first)?.min(len)..len),
        (first, last) => {
            let (first, last) = (number(first)?, number(last)?);
            (first <= last).then(|| first.min(len)..last.saturating_add(1).min(len))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(clippy::single_range_in_vec_init, reason = "one range is what is meant")]
    fn ranges_are_read_as_rfc_9110_says() {
        for (header, expected) in [
            ("bytes=0-499", Asked::Parts(vec![0..500])),
            ("bytes=500-", Asked::Parts(vec![500..1000])),
            ("bytes=-1", Asked::Parts(vec![999..1000])),
            ("bytes=-5000", Asked::Parts(vec![0..1000])),
            ("bytes=999-99999999999999999999999", Asked::Parts(vec![999..1000])),
            ("Bytes=0-0, -1", Asked::Parts(vec![0..1, 999..1000])),
            ("bytes= 0-0 ,, 2-2", Asked::Parts(vec![0..1, 2..3])),
            ("bytes=0-0,5000-", Asked::Parts(vec![0..1])),
            ("bytes=1000-", Asked::Nothing),
            ("bytes=-0", Asked::Nothing),
            ("bytes=18446744073709551615-18446744073709551615", Asked::Nothing),
            ("bytes=", Asked::All),
            ("bytes=1-0", Asked::All),
            ("bytes=a-b", Asked::All),
            ("bytes=0-0,x", Asked::All),
            ("bytes=--1", Asked::All),
            ("bytes=+1-2", Asked::All),
            ("lines=0-1", Asked::All),
            ("", Asked::All),
            ("bytes=0-999,0-999", Asked::All),
        ] {
            assert_eq!(read(header, 1000), expected, "{header}");
        }
        assert_eq!(read("bytes=0-", 0), Asked::Nothing);
        assert_eq!(read("bytes=-1", 0), Asked::Nothing);
        let many = (0..17).map(|n| format!("{n}-{n}")).collect::<Vec<_>>().join(",");
        assert_eq!(read(&format!("bytes={many}"), 1000), Asked::All);
    }
}
