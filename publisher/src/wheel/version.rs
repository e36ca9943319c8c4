//! What is a version (PEP 440). It is checked and kept to the letter: devices compare the text.

use std::sync::LazyLock;

use mpypi_protocol::limits::TEXT;
use regex::Regex;

/// PEP 440, appendix B, without the surrounding white space and with case folded.
static VERSION: LazyLock<Regex> = LazyLock::new(|| {
    let pre = r"[-_.]?(alpha|beta|preview|pre|a|b|c|rc)[-_.]?[0-9]*";
    let post = r"-[0-9]+|[-_.]?(post|rev|r)[-_.]?[0-9]*";
    let dev = r"[-_.]?dev[-_.]?[0-9]*";
    let local = r"\+[a-z0-9]+([-_.][a-z0-9]+)*";
    Regex::new(&format!(r"^(?i-u:v?([0-9]+!)?[0-9]+(\.[0-9]+)*({pre})?({post})?({dev})?({local})?)$"))
        .expect("the pattern is a constant")
});

/// Checks that `version` is one, and one that stands unchanged in the name of a dist-info folder.
///
/// # Errors
/// Says what is wrong with it.
pub fn check(version: &str) -> Result<(), String> {
    if version.len() > TEXT || !VERSION.is_match(version) {
        return Err(format!("`{}` is no version such as `1.4.0` (PEP 440)", version.escape_debug()));
    }
    // Mpy-BLOX looks for the folder by METADATA's version; the folder's name cannot hold a `-`.
    if version.contains('-') {
        return Err(format!("`{version}` has a `-`, which no dist-info folder can have"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_pep_440_allows_is_a_version() {
        for version in ["1", "1.0", "1.4.0rc1", "2!1.0.post3", "1.0.dev4", "v1.0", "1.0+esp32.2", "1.0A1"] {
            assert_eq!(check(version), Ok(()), "{version}");
        }
    }

    #[test]
    fn anything_else_is_none() {
        for version in ["", "1.x", "1..0", "latest", " 1.0", "1.0\n", "1.0-1", "1.0 beta", "1.０"] {
            assert!(check(version).is_err(), "{version:?}");
        }
    }
}
