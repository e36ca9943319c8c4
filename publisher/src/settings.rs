//! `channel.toml`: the few things about a channel that its folder cannot say by itself.

use std::{
    io,
    path::{Path, PathBuf},
};

use mpypi_protocol::{ChannelName, KeyId, Tag, limits};
use toml::Value;

use crate::{
    compile::{Compile, Target},
    walk,
};

/// What `channel.toml` says. All of it is optional.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Settings {
    /// `name`: the channel's name; the folder's name otherwise.
    pub name: Option<ChannelName>,
    /// `version`: the release's version, for people; its sequence number otherwise.
    pub version: Option<String>,
    /// `tag`: the compatibility tag of wheels packed here; `py3-none-any` otherwise.
    pub tag: Option<String>,
    /// `compile`, `targets`, `optimize`, `line-numbers`: what becomes of the Python source in wheels.
    pub compile: Option<Compile>,
    /// `key`: the name of the key that signs the channel's lists.
    pub key: Option<KeyId>,
    /// `ignore`: patterns as in `.gitignore`, relative to the channel's folder.
    pub ignore: Vec<String>,
    /// `expires`: devices stop believing a release that is older than so many days.
    pub expires_days: Option<u32>,
}

/// Why a `channel.toml` is refused.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// The file cannot be read.
    #[error("cannot read `{}`", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is not TOML.
    #[error("channel file `{}`, line {line}: {problem}", path.display())]
    Toml {
        /// The file.
        path: PathBuf,
        /// Which line, from 1.
        line: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// A key that means nothing.
    #[error(
        "channel file `{}` has unknown key `{key}`{}",
        path.display(), meant.map(|key| format!(" (did you mean `{key}`?)")).unwrap_or_default()
    )]
    UnknownKey {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// A known key that looks like it.
        meant: Option<&'static str>,
    },
    /// A key with a value it cannot have.
    #[error("channel file `{}`: `{key}` should be {expected}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What its value should be.
        expected: String,
    },
    /// Two keys that contradict each other, or one that means nothing without another.
    #[error("channel file `{}`: {problem}", path.display())]
    Together {
        /// The file.
        path: PathBuf,
        /// Which keys, and why not.
        problem: String,
    },
}

impl Settings {
    /// The name of the file.
    pub const FILE: &'static str = "channel.toml";

    /// The keys of the file.
    pub const KEYS: [&'static str; 10] = [
        "name",
        "version",
        "tag",
        "key",
        "compile",
        "targets",
        "optimize",
        "line-numbers",
        "ignore",
        "expires",
    ];

    /// Reads the `channel.toml` of `folder`; without one, everything is as usual.
    ///
    /// # Errors
    /// Says which file, key and value is wrong.
    pub fn load(folder: &Path) -> Result<Settings, SettingsError> {
        let path = folder.join(Self::FILE);
        let text = walk::read(&path).and_then(|bytes| {
            String::from_utf8(bytes)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.utf8_error()))
        });
        match text {
            Ok(text) => Settings::parse(&text, &path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Settings::default()),
            Err(source) => Err(SettingsError::Read { path, source }),
        }
    }

    fn parse(text: &str, path: &Path) -> Result<Settings, SettingsError> {
        let table: toml::Table = text.parse().map_err(|error: toml::de::Error| SettingsError::Toml {
            path: path.to_owned(),
            line: error.span().map_or(1, |span| text[..span.start].matches('\n').count() + 1),
            problem: error.message().replace('\n', ", "),
        })?;
        let mut settings = Settings::default();
        let mut compiling = Compiling::default();
        for (key, value) in table {
            let wrong =
                |expected: String| SettingsError::Value { path: path.to_owned(), key: key.clone(), expected };
            match key.as_str() {
                "name" => {
                    let name = value.as_str().ok_or_else(|| wrong("a text".to_owned()))?;
                    let name = ChannelName::new(name).map_err(|error| wrong(format!("a name: {error}")))?;
                    settings.name = Some(name);
                }
                "version" => settings.version = Some(short_text(&value).map_err(wrong)?),
                "tag" => {
                    let tag = short_text(&value).map_err(wrong)?;
                    if Tag::new(&*tag).is_err() {
                        return Err(wrong(
                            "a tag such as `py3-none-any` or `mpy6-bytecode-esp32`".to_owned(),
                        ));
                    }
                    settings.tag = Some(tag);
                }
                "key" => {
                    let name = value.as_str().ok_or_else(|| wrong("the name of a key".to_owned()))?;
                    let key =
                        KeyId::new(name).map_err(|error| wrong(format!("the name of a key: {error}")))?;
                    settings.key = Some(key);
                }
                "compile" => match value.as_str() {
                    Some("mpy") => compiling.wanted = true,
                    _ => return Err(wrong("`\"mpy\"`, or not there".to_owned())),
                },
                "targets" => {
                    let expected =
                        || wrong("an array of targets, as `[\"bytecode\", \"xtensawin\"]`".to_owned());
                    let values = value.as_array().filter(|values| !values.is_empty()).ok_or_else(expected)?;
                    let mut targets = Vec::new();
                    for value in values {
                        let target = Target::parse(value.as_str().ok_or_else(expected)?);
                        targets
                            .push(target.map_err(|target| wrong(format!("an array of targets: {target}")))?);
                    }
                    compiling.targets = Some(targets);
                }
                "optimize" => {
                    let level = value.as_integer().and_then(|level| u8::try_from(level).ok());
                    let level = level.filter(|level| *level <= Compile::OPTIMIZE_MOST);
                    compiling.optimize = Some(level.ok_or_else(|| wrong("a level from 0 to 3".to_owned()))?);
                }
                "line-numbers" => {
                    let kept = value.as_bool().ok_or_else(|| wrong("`true` or `false`".to_owned()))?;
                    compiling.line_numbers = Some(kept);
                }
                "ignore" => {
                    let pattern = |value: Value| value.as_str().map(str::to_owned);
                    settings.ignore = value
                        .as_array()
                        .and_then(|values| values.iter().cloned().map(pattern).collect())
                        .ok_or_else(|| wrong("an array of patterns, as `[\"*.md\"]`".to_owned()))?;
                }
                "expires" => {
                    let days = value.as_integer().and_then(|days| u32::try_from(days).ok());
                    settings.expires_days = Some(
                        days.filter(|days| (1..=36_500).contains(days))
                            .ok_or_else(|| wrong("a whole number of days from 1 to 36500".to_owned()))?,
                    );
                }
                _ => {
                    let meant = closest(&key, &Self::KEYS);
                    return Err(SettingsError::UnknownKey { path: path.to_owned(), key, meant });
                }
            }
        }
        settings.compile = compiling.checked(settings.tag.is_some()).map_err(|problem| {
            SettingsError::Together { path: path.to_owned(), problem: problem.to_owned() }
        })?;
        Ok(settings)
    }
}

/// The keys about compiling, before they are compared with each other.
#[derive(Default)]
struct Compiling {
    wanted: bool,
    targets: Option<Vec<Target>>,
    optimize: Option<u8>,
    line_numbers: Option<bool>,
}

impl Compiling {
    fn checked(self, has_tag: bool) -> Result<Option<Compile>, &'static str> {
        let Compiling { wanted, targets, optimize, line_numbers } = self;
        if !wanted {
            return match (targets, optimize, line_numbers) {
                (None, None, None) => Ok(None),
                (Some(_), ..) => Err("`targets` means nothing without `compile = \"mpy\"`"),
                (_, Some(_), _) => Err("`optimize` means nothing without `compile = \"mpy\"`"),
                (.., Some(_)) => Err("`line-numbers` means nothing without `compile = \"mpy\"`"),
            };
        }
        if has_tag {
            return Err("`tag` cannot stand beside `compile`: what mpy-cross makes decides the tags");
        }
        let optimize = optimize.unwrap_or(0);
        if optimize == Compile::OPTIMIZE_MOST && line_numbers == Some(true) {
            return Err("`optimize = 3` leaves line numbers out: `line-numbers = true` needs a lower level");
        }
        Ok(Some(Compile {
            targets: targets.unwrap_or_else(|| vec![Target::bytecode()]),
            optimize,
            line_numbers: line_numbers.unwrap_or(optimize < Compile::OPTIMIZE_MOST),
        }))
    }
}

impl SettingsError {
    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            SettingsError::UnknownKey { .. } => {
                let keys = Settings::KEYS.map(|key| format!("`{key}`")).join(", ");
                Some(format!("the keys are {keys}"))
            }
            _ => None,
        }
    }
}

fn short_text(value: &Value) -> Result<String, String> {
    let expected = || format!("a text of 1 to {} bytes in quotes", limits::TEXT);
    let text = value.as_str().ok_or_else(expected)?;
    match (1..=limits::TEXT).contains(&text.len()) && !text.contains(char::is_control) {
        true => Ok(text.to_owned()),
        false => Err(expected()),
    }
}

/// The known word nearest to `word`, if one is near enough to be a slip of the finger.
fn closest(word: &str, known: &[&'static str]) -> Option<&'static str> {
    let near = |other: &&str| distance(word, other) <= 1 + other.len() / 5;
    known.iter().copied().filter(near).min_by_key(|other| distance(word, other))
}

/// How many letters must be changed, added or left out to make one of the other (Levenshtein).
fn distance(one: &str, other: &str) -> usize {
    let mut row: Vec<usize> = (0..=other.chars().count()).collect();
    for (line, a) in one.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = line + 1;
        for (column, b) in other.chars().enumerate() {
            let changed = diagonal + usize::from(a != b);
            diagonal = row[column + 1];
            row[column + 1] = changed.min(row[column] + 1).min(diagonal + 1);
        }
    }
    row[row.len() - 1]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Settings, String> {
        Settings::parse(text, Path::new("dev/channel.toml")).map_err(|error| error.to_string())
    }

    #[test]
    fn every_key_is_read() {
        let settings = parse(
            "name = \"dev\"\nversion = \"1.4\"\ntag = \"mpy6-bytecode-esp32\"\nignore = [\"*.md\"]\nexpires = 90\nkey = \"dev-2026\"\n",
        );
        let expected = Settings {
            name: Some(ChannelName::new("dev").unwrap()),
            version: Some("1.4".into()),
            tag: Some("mpy6-bytecode-esp32".into()),
            key: Some(KeyId::new("dev-2026").unwrap()),
            compile: None,
            ignore: vec!["*.md".into()],
            expires_days: Some(90),
        };
        assert_eq!(settings, Ok(expected));
    }

    #[test]
    fn an_unknown_key_is_an_error_that_names_the_key_that_was_meant() {
        let error = parse("versoin = \"1\"").unwrap_err();
        assert_eq!(
            error,
            "channel file `dev/channel.toml` has unknown key `versoin` (did you mean `version`?)"
        );
        assert_eq!(
            parse("rollout = 1").unwrap_err(),
            "channel file `dev/channel.toml` has unknown key `rollout`"
        );
    }

    #[test]
    fn a_wrong_value_is_an_error_that_says_what_belongs_there() {
        for text in [
            "version = 1.4",
            "name = \"a b\"",
            "tag = \"esp32\"",
            "ignore = \"*\"",
            "expires = 0",
            "key = \"a b\"",
        ] {
            assert!(parse(text).unwrap_err().contains("should be"), "{text}");
        }
        assert!(parse("name = \"dev\"\nversion = ").unwrap_err().contains("line 2"));
    }

    #[test]
    fn what_is_compiled_for_whom_is_read() {
        let compile = |text: &str| parse(text).map(|settings| settings.compile);
        let usual = Compile { targets: vec![Target::bytecode()], optimize: 0, line_numbers: true };
        assert_eq!(compile("compile = \"mpy\""), Ok(Some(usual)));
        let targets = ["source", "bytecode", "xtensawin", "armv6m-rp2"];
        let all = Compile {
            targets: targets.map(|target| Target::parse(target).unwrap()).to_vec(),
            optimize: 2,
            line_numbers: false,
        };
        let text = format!("compile = \"mpy\"\ntargets = {targets:?}\noptimize = 2\nline-numbers = false\n");
        assert_eq!(compile(&text), Ok(Some(all)));
        let least = compile("compile = \"mpy\"\noptimize = 3").unwrap().unwrap();
        assert!(!least.line_numbers, "mpy-cross leaves them out at that level");
    }

    #[test]
    fn keys_about_compiling_that_make_no_sense_are_refused() {
        for (text, word) in [
            ("compile = true", "should be"),
            ("compile = \"mpy\"\ntargets = []", "should be"),
            ("compile = \"mpy\"\ntargets = [\"esp32\"]", "not `esp32`"),
            ("compile = \"mpy\"\ntargets = [\"xtensawin-\"]", "not `xtensawin-`"),
            ("compile = \"mpy\"\ntargets = [\"bytecode-ESP32\"]", "not `bytecode-ESP32`"),
            ("compile = \"mpy\"\noptimize = 4", "should be"),
            ("compile = \"mpy\"\nline-numbers = 1", "should be"),
            ("compile = \"mpy\"\ntag = \"py3-none-any\"", "`tag` cannot stand beside `compile`"),
            ("compile = \"mpy\"\noptimize = 3\nline-numbers = true", "needs a lower level"),
            ("targets = [\"bytecode\"]", "means nothing without"),
            ("optimize = 1", "means nothing without"),
            ("line-numbers = true", "means nothing without"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}
