//! The texts inside a wheel (PEP 427): RECORD, METADATA and WHEEL, and how its dist-info folder is named.

use std::collections::HashSet;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};

use crate::{Digest, FilePath, path::PathError};

/// The folder in a device's root that wheels are unpacked into.
pub const ROOT: &str = "lib";

/// One line of RECORD: a file of the wheel. RECORD's own line has neither digest nor size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordLine {
    /// The file, relative to [`ROOT`].
    pub path: FilePath,
    /// Its SHA-256.
    pub digest: Option<Digest>,
    /// Its size in bytes.
    pub size: Option<u64>,
}

/// Why a text of a wheel is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WheelTextError {
    /// A RECORD line is not `path,hash,size`.
    #[error("RECORD line {line}: `{}` is not `path,hash,size`", text.escape_debug())]
    Record {
        /// Which line, from 1.
        line: usize,
        /// The line.
        text: String,
    },
    /// A RECORD line's path leads out of the root.
    #[error("RECORD line {line}: {problem}")]
    Path {
        /// Which line, from 1.
        line: usize,
        /// What is wrong with the path.
        problem: PathError,
    },
    /// A RECORD names one file twice, so nobody can say which of its hashes holds.
    #[error("RECORD line {line}: `{path}` is in an earlier line, too")]
    Twice {
        /// Which line, from 1.
        line: usize,
        /// The file.
        path: FilePath,
    },
    /// A header line is not `Key: value`.
    #[error("line {line}: `{}` is not `Key: value`", text.escape_debug())]
    Header {
        /// Which line, from 1.
        line: usize,
        /// The line.
        text: String,
    },
}

/// Reads a RECORD file. Quoted names (PEP 376) are understood; hashes other than sha256 are refused.
///
/// # Errors
/// Says which line and what is wrong with it.
pub fn parse_record(text: &str) -> Result<Vec<RecordLine>, WheelTextError> {
    let mut lines = Vec::new();
    let mut seen = HashSet::new();
    for (index, text) in text.lines().enumerate().filter(|(_, line)| !line.is_empty()) {
        let line = index + 1;
        let error = || WheelTextError::Record { line, text: text.to_owned() };
        let (path, rest) = first_field(text).ok_or_else(error)?;
        let (hash, size) = rest.split_once(',').ok_or_else(error)?;
        let digest = match hash.strip_prefix("sha256=") {
            Some(base64) => Some(decode(base64).ok_or_else(error)?),
            None if hash.is_empty() => None,
            None => return Err(error()),
        };
        let size = match size {
            "" => None,
            size if size.bytes().all(|c| c.is_ascii_digit()) => Some(size.parse().map_err(|_| error())?),
            _ => return Err(error()),
        };
        let path = FilePath::new(path).map_err(|problem| WheelTextError::Path { line, problem })?;
        if !seen.insert(path.clone()) {
            return Err(WheelTextError::Twice { line, path });
        }
        lines.push(RecordLine { path, digest, size });
    }
    Ok(lines)
}

/// Writes a RECORD file, one line for each file. A name with a comma or quotation mark is quoted, which Mpy-BLOX
/// cannot read.
#[must_use]
pub fn write_record<'a>(lines: impl IntoIterator<Item = &'a RecordLine>) -> String {
    let mut text = String::new();
    for line in lines {
        let hash = line.digest.map(|digest| format!("sha256={}", URL_SAFE_NO_PAD.encode(digest.as_bytes())));
        let size = line.size.map(|size| size.to_string());
        let path = match line.path.as_str() {
            path if path.contains([',', '"']) => format!("\"{}\"", path.replace('"', "\"\"")),
            path => path.to_owned(),
        };
        text += &format!("{path},{},{}\n", hash.unwrap_or_default(), size.unwrap_or_default());
    }
    text
}

/// Reads the header lines of METADATA or WHEEL, up to the first blank line. A folded line is joined to the
/// one before it.
///
/// # Errors
/// Says which line is no header.
pub fn parse_headers(text: &str) -> Result<Vec<(String, String)>, WheelTextError> {
    let mut headers: Vec<(String, String)> = Vec::new();
    for (index, line) in text.lines().enumerate() {
        if line.is_empty() {
            break;
        }
        if let (true, Some((_, value))) = (line.starts_with([' ', '\t']), headers.last_mut()) {
            let more = line.trim();
            if !value.is_empty() && !more.is_empty() {
                value.push(' ');
            }
            value.push_str(more);
            continue;
        }
        match line.split_once(':') {
            Some((key, value)) if !key.is_empty() && !key.contains([' ', '\t']) => {
                headers.push((key.to_owned(), value.trim().to_owned()));
            }
            _ => return Err(WheelTextError::Header { line: index + 1, text: line.to_owned() }),
        }
    }
    Ok(headers)
}

/// A package's name as it stands in a wheel's file name and dist-info folder: lowercase, with runs of `-`, `_`
/// and `.` made one `_` (PEP 427 and the binary distribution format specification).
#[must_use]
pub fn normalized_name(name: &str) -> String {
    let mut normal = String::with_capacity(name.len());
    for character in name.chars() {
        match character {
            '-' | '_' | '.' if normal.ends_with('_') => {}
            '-' | '_' | '.' => normal.push('_'),
            _ => normal.push(character.to_ascii_lowercase()),
        }
    }
    normal
}

/// The dist-info folder of a package, as `demo_pkg-1.1.dist-info`.
#[must_use]
pub fn dist_info(name: &str, version: &str) -> String {
    format!("{}-{}.dist-info", normalized_name(name), version.replace('-', "_"))
}

/// The first field of a line of CSV, unquoted, and what follows the comma behind it.
fn first_field(line: &str) -> Option<(String, &str)> {
    let Some(quoted) = line.strip_prefix('"') else {
        return line.split_once(',').map(|(field, rest)| (field.to_owned(), rest));
    };
    let mut field = String::new();
    let mut rest = quoted;
    loop {
        let (piece, after) = rest.split_once('"')?;
        field.push_str(piece);
        match after.strip_prefix('"') {
            Some(_) => field.push('"'),
            None => return Some((field, after.strip_prefix(',')?)),
        }
        rest = &after[1..];
    }
}

fn decode(base64: &str) -> Option<Digest> {
    let bytes: [u8; 32] = URL_SAFE_NO_PAD.decode(base64.trim_end_matches('=')).ok()?.try_into().ok()?;
    Some(Digest::from(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_survives_being_written_and_read() {
        let line = |path, digest, size| RecordLine { path: FilePath::new(path).unwrap(), digest, size };
        let lines = vec![
            line("blink/__init__.py", Some(Digest::EMPTY), Some(0)),
            line("blink-1.0.dist-info/RECORD", None, None),
        ];
        let text = write_record(&lines);
        assert_eq!(
            text,
            "blink/__init__.py,sha256=47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU,0\n\
             blink-1.0.dist-info/RECORD,,\n"
        );
        assert_eq!(parse_record(&text), Ok(lines));
    }

    #[test]
    fn a_record_that_leads_out_of_the_root_is_refused_with_its_line() {
        let error = parse_record("a.py,,\n../boot.py,,\n").unwrap_err();
        assert!(matches!(error, WheelTextError::Path { line: 2, .. }), "{error}");
    }

    #[test]
    fn a_name_with_quotes_and_commas_survives() {
        let lines = [RecordLine { path: FilePath::new("a\",b\".py").unwrap(), digest: None, size: None }];
        assert_eq!(write_record(&lines), "\"a\"\",b\"\".py\",,\n");
        assert_eq!(parse_record(&write_record(&lines)), Ok(lines.to_vec()));
    }

    #[test]
    fn names_are_normalised_for_the_dist_info_folder() {
        assert_eq!(dist_info("Demo-.Pkg", "1.1"), "demo_pkg-1.1.dist-info");
    }

    #[test]
    fn headers_end_at_the_first_blank_line() {
        let headers = parse_headers("Name: blink\nSummary: two\n lines\n\nA description: not a header\n");
        let expected = [("Name", "blink"), ("Summary", "two lines")];
        assert_eq!(headers.unwrap(), expected.map(|(k, v)| (k.to_owned(), v.to_owned())));
    }
}
