//! What an image below `firmware/` is called, which version it is, and which hardware it is for.
//!
//! `channel.toml` goes first; then a file's name, if it is `firmware-<key>-v<version>.bin`, as projectMM calls its
//! images: `<key>` is the name and the hardware. Any other image has its file's stem for a name and the
//! channel's `version`, and is for all hardware.

use std::path::Path;

/// What `channel.toml` says of one image.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Given {
    /// `name`: what it is called.
    pub name: Option<String>,
    /// `version`: its version, as it is.
    pub version: Option<String>,
    /// `target`: the hardware it is for.
    pub target: Option<String>,
}

impl Given {
    /// The keys of its table.
    pub const KEYS: [&'static str; 3] = ["name", "version", "target"];
}

/// What the channel's list says of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Title {
    /// What it is called.
    pub name: String,
    /// Its version.
    pub version: String,
    /// The hardware it is for, unless it is for all.
    pub target: Option<String>,
}

/// Whether a file below `firmware/` is an image without being named in `channel.toml`.
#[must_use]
pub fn is_image(file: &str) -> bool {
    Path::new(file).extension().is_some_and(|extension| extension == "bin")
}

/// What the image in `file` is; none if nothing says its version.
#[must_use]
pub fn title(file: &str, given: Option<&Given>, channel_version: Option<&str>) -> Option<Title> {
    let stem = Path::new(file).file_stem()?.to_str()?;
    let (key, version) = key_and_version(stem).unzip();
    let Given { name, version: given_version, target } = given.cloned().unwrap_or_default();
    Some(Title {
        name: name.unwrap_or_else(|| key.unwrap_or(stem).to_owned()),
        version: given_version.or_else(|| version.or(channel_version).map(str::to_owned))?,
        target: target.or_else(|| key.map(str::to_owned)),
    })
}

/// `firmware-<key>-v<version>`. The version is what follows the first `-v` with a digit after it: it may hold a `-`
/// itself, as in `3.1.0-dev.4`, and so may the key.
fn key_and_version(stem: &str) -> Option<(&str, &str)> {
    let rest = stem.strip_prefix("firmware-")?;
    let starts_version = |(at, _): &(usize, &str)| rest[at + 2..].starts_with(|c: char| c.is_ascii_digit());
    let (at, _) = rest.match_indices("-v").find(starts_version)?;
    (at > 0).then(|| (&rest[..at], &rest[at + 2..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn titled(
        file: &str,
        given: Option<&Given>,
        channel: Option<&str>,
    ) -> Option<(String, String, Option<String>)> {
        title(file, given, channel).map(|title| (title.name, title.version, title.target))
    }

    fn owned(name: &str, version: &str, target: Option<&str>) -> Option<(String, String, Option<String>)> {
        Some((name.to_owned(), version.to_owned(), target.map(str::to_owned)))
    }

    #[test]
    fn the_name_of_a_file_says_what_an_image_is() {
        for (file, title) in [
            ("firmware-esp32-v3.0.0.bin", owned("esp32", "3.0.0", Some("esp32"))),
            ("firmware-esp32-eth-v3.1.0-dev.4.bin", owned("esp32-eth", "3.1.0-dev.4", Some("esp32-eth"))),
            ("old/firmware-esp32-vanilla-v1.10.bin", owned("esp32-vanilla", "1.10", Some("esp32-vanilla"))),
            ("firmware--v1.bin", owned("firmware--v1", "7", None)),
            ("firmware-esp32-vX.bin", owned("firmware-esp32-vX", "7", None)),
            ("thing.bin", owned("thing", "7", None)),
        ] {
            assert_eq!(titled(file, None, Some("7")), title, "{file}");
        }
        assert_eq!(titled("thing.bin", None, None), None, "nothing says its version");
    }

    #[test]
    fn what_is_given_goes_first() {
        let some = |text: &str| Some(text.to_owned());
        let given = Given { name: some("thing"), version: some("1.10"), target: some("esp32-eth") };
        assert_eq!(
            titled("firmware-a-v1.bin", Some(&given), Some("7")),
            owned("thing", "1.10", Some("esp32-eth"))
        );
        let version = Given { version: some("1.10"), ..Given::default() };
        assert_eq!(titled("a.bin", Some(&version), None), owned("a", "1.10", None));
        assert_eq!(titled("firmware-a-v1.bin", Some(&version), None), owned("a", "1.10", Some("a")));
    }
}
