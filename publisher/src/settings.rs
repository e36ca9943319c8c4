//! `channel.toml`: the few things about a channel that its folder cannot say by itself.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::{Path, PathBuf},
};

use jiff::Timestamp;
use mpypi_client::args::parse_time;
use mpypi_protocol::{
    ChannelName, KeyId, Query, Tag, limits,
    rollout::{Percent, Window},
};
use toml::Value;

use crate::{
    compile::{Compile, Target},
    firmware::Given,
    rollout::{OnFailure, Policy, start::patience},
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
    /// `[packages.NAME]`, `optional = true`: a wheel or an image that a device takes only if somebody there chose it.
    pub optional: BTreeSet<String>,
    /// `expires`: devices stop believing a release that is older than so many days.
    pub expires_days: Option<u32>,
    /// `[firmware."esp32.bin"]`: what is said of an image, by its path below `firmware/`.
    pub firmware: BTreeMap<String, Given>,
    /// `[rollout]`: how `mpypi rollout` goes about it, unless told otherwise.
    pub rollout: RolloutSettings,
}

/// What `[rollout]` in `channel.toml` says, or the command line.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RolloutSettings {
    /// `steps`: how many of the nodes at each step, as `"1%,10%,50%,100%"`.
    pub steps: Option<Vec<Percent>>,
    /// `wait`: how long a step takes at least, in seconds.
    pub wait: Option<u64>,
    /// `patience`: when a step that does not get to `min-success` is given up, in seconds.
    pub patience: Option<u64>,
    /// `max-failures`: more than that of a step's nodes failed.
    pub max_failures: Option<Percent>,
    /// `min-success`: at least that of a step's nodes have the release.
    pub min_success: Option<Percent>,
    /// `rollback-on-failure`
    pub rollback_on_failure: Option<bool>,
    /// `only`: for which nodes.
    pub only: Option<Query>,
    /// `not-before`: when at the earliest.
    pub not_before: Option<Timestamp>,
    /// `window`: at which time of day.
    pub window: Option<Window>,
    /// `jitter`: each node waits for a time of its own, up to so many seconds.
    pub jitter: Option<u32>,
    /// `optional`: each node waits for an order.
    pub optional: Option<bool>,
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
        /// The keys that are known there.
        known: &'static [&'static str],
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
    pub const KEYS: [&'static str; 13] = [
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
        "rollout",
        "firmware",
        "packages",
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
                "rollout" => {
                    let table =
                        value.as_table().ok_or_else(|| wrong("a table, as `[rollout]`".to_owned()))?;
                    settings.rollout = RolloutSettings::parse(table, path)?;
                }
                "firmware" => settings.firmware = firmware(value, path)?,
                "packages" => settings.optional = optional(value, path)?,
                _ => return Err(unknown(path, key, &Self::KEYS)),
            }
        }
        settings.compile = compiling.checked(settings.tag.is_some()).map_err(|problem| {
            SettingsError::Together { path: path.to_owned(), problem: problem.to_owned() }
        })?;
        Ok(settings)
    }
}

impl RolloutSettings {
    /// The keys of `[rollout]`.
    pub const KEYS: [&'static str; 11] = [
        "steps",
        "wait",
        "patience",
        "max-failures",
        "min-success",
        "rollback-on-failure",
        "only",
        "not-before",
        "window",
        "jitter",
        "optional",
    ];

    fn parse(table: &toml::Table, path: &Path) -> Result<RolloutSettings, SettingsError> {
        let mut settings = RolloutSettings::default();
        for (key, value) in table {
            let wrong = |expected: String| SettingsError::Value {
                path: path.to_owned(),
                key: format!("rollout.{key}"),
                expected,
            };
            // A percentage may be written as a number, and a time as TOML writes it.
            let text = match value {
                Value::Datetime(time) => Some(time.to_string()),
                Value::String(text) => Some(text.clone()),
                Value::Integer(number) => Some(number.to_string()),
                Value::Float(number) => Some(number.to_string()),
                _ => None,
            };
            let text = || text.clone().ok_or_else(|| wrong("a text".to_owned()));
            let percent = || parse_percent(&text()?).map_err(wrong);
            let time = || parse_seconds(&text()?).map_err(wrong);
            let yes = || value.as_bool().ok_or_else(|| wrong("`true` or `false`".to_owned()));
            match key.as_str() {
                "steps" => settings.steps = Some(parse_steps(&text()?).map_err(wrong)?),
                "wait" => settings.wait = Some(time()?),
                "patience" => settings.patience = Some(time()?),
                "max-failures" => settings.max_failures = Some(percent()?),
                "min-success" => settings.min_success = Some(percent()?),
                "rollback-on-failure" => settings.rollback_on_failure = Some(yes()?),
                "only" => {
                    let query = text()?.parse();
                    settings.only = Some(query.map_err(|error| wrong(format!("a query: {error}")))?);
                }
                "not-before" => settings.not_before = Some(parse_not_before(&text()?).map_err(wrong)?),
                "window" => {
                    let window = text()?.parse();
                    settings.window =
                        Some(window.map_err(|_| wrong("a window, as `22:00-04:00`".to_owned()))?);
                }
                "jitter" => settings.jitter = Some(parse_jitter(&text()?).map_err(wrong)?),
                "optional" => settings.optional = Some(yes()?),
                _ => {
                    let meant = closest(key, &Self::KEYS);
                    let (path, key) = (path.to_owned(), format!("rollout.{key}"));
                    return Err(SettingsError::UnknownKey { path, key, meant, known: &Self::KEYS });
                }
            }
        }
        Ok(settings)
    }

    /// What is said here; where it says nothing, what `other` says.
    #[must_use]
    pub fn or(self, other: RolloutSettings) -> RolloutSettings {
        RolloutSettings {
            steps: self.steps.or(other.steps),
            wait: self.wait.or(other.wait),
            patience: self.patience.or(other.patience),
            max_failures: self.max_failures.or(other.max_failures),
            min_success: self.min_success.or(other.min_success),
            rollback_on_failure: self.rollback_on_failure.or(other.rollback_on_failure),
            only: self.only.or(other.only),
            not_before: self.not_before.or(other.not_before),
            window: self.window.or(other.window),
            jitter: self.jitter.or(other.jitter),
            optional: self.optional.or(other.optional),
        }
    }

    /// How a rollout goes that this is said about.
    ///
    /// # Errors
    /// It makes no sense.
    pub fn policy(self) -> Result<Policy, &'static str> {
        let hundredths = |number| Percent::from_hundredths(number).unwrap_or(Percent::ALL);
        let wait = self.wait.unwrap_or(600);
        let policy = Policy {
            steps: self.steps.unwrap_or_else(|| [100, 1000, 5000, 10_000].map(hundredths).to_vec()),
            wait,
            patience: self.patience.unwrap_or_else(|| patience(wait)),
            max_failures: self.max_failures.unwrap_or(hundredths(200)),
            min_success: self.min_success.unwrap_or(hundredths(9500)),
            on_failure: match self.rollback_on_failure {
                Some(true) => OnFailure::RollBack,
                _ => OnFailure::Pause,
            },
            only: self.only,
            not_before: self.not_before,
            window: self.window,
            jitter: self.jitter.unwrap_or_default(),
            optional: self.optional.unwrap_or_default(),
        };
        policy.problem().map_or(Ok(policy), Err)
    }
}

/// Reads `2.5%` or `2.5`.
///
/// # Errors
/// Says what it should be.
pub fn parse_percent(text: &str) -> Result<Percent, String> {
    let number = text.strip_suffix('%').unwrap_or(text);
    number.parse().map_err(|_| "a percentage with at most two decimals, as `2.5%`".to_owned())
}

/// Reads `1%,10%,100%`.
///
/// # Errors
/// Says what it should be.
pub fn parse_steps(text: &str) -> Result<Vec<Percent>, String> {
    let steps: Result<_, _> = text.split(',').map(|step| parse_percent(step.trim())).collect();
    steps.map_err(|_| "percentages, as `1%,10%,50%,100%`".to_owned())
}

/// Reads `10m`, as whole seconds.
///
/// # Errors
/// Says what it should be.
pub fn parse_seconds(text: &str) -> Result<u64, String> {
    let time = parse_time(text).map_err(|_| "a time, as `30s`, `10m` or `2h`".to_owned())?;
    match time.subsec_millis() {
        0 => Ok(time.as_secs()),
        _ => Err("a time of whole seconds".to_owned()),
    }
}

/// Reads `2026-12-01T22:00:00Z`, or another offset from UTC than none.
///
/// # Errors
/// Says what it should be.
pub fn parse_not_before(text: &str) -> Result<Timestamp, String> {
    text.parse().map_err(|_| "a time with its offset from UTC, as `2026-12-01T22:00:00Z`".to_owned())
}

/// Reads `10m`, at most a day.
///
/// # Errors
/// Says what it should be.
pub fn parse_jitter(text: &str) -> Result<u32, String> {
    let seconds = parse_seconds(text)?;
    let seconds = u32::try_from(seconds).ok().filter(|seconds| *seconds <= limits::JITTER);
    seconds.ok_or_else(|| "a time of at most a day".to_owned())
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
            SettingsError::UnknownKey { known, .. } => {
                let keys: Vec<_> = known.iter().map(|key| format!("`{key}`")).collect();
                Some(format!("the keys are {}", keys.join(", ")))
            }
            _ => None,
        }
    }
}

/// What the tables below `firmware` say, each of one image.
fn firmware(value: Value, path: &Path) -> Result<BTreeMap<String, Given>, SettingsError> {
    let wrong = |key: String, expected: String| SettingsError::Value { path: path.to_owned(), key, expected };
    let Value::Table(images) = value else {
        let expected = "tables, one for each image, as `[firmware.\"esp32.bin\"]`".to_owned();
        return Err(wrong("firmware".to_owned(), expected));
    };
    let mut all = BTreeMap::new();
    for (file, keys) in images {
        let place = format!("firmware.\"{file}\"");
        let Value::Table(keys) = keys else {
            return Err(wrong(place, "a table of `name`, `version` and `target`".to_owned()));
        };
        let mut given = Given::default();
        for (key, value) in keys {
            let known = match key.as_str() {
                "name" => &mut given.name,
                "version" => &mut given.version,
                "target" => &mut given.target,
                _ => return Err(unknown(path, key, &Given::KEYS)),
            };
            *known = Some(short_text(&value).map_err(|expected| wrong(format!("{place}.{key}"), expected))?);
        }
        all.insert(file, given);
    }
    Ok(all)
}

/// The packages whose table below `packages` says that they are optional.
fn optional(value: Value, path: &Path) -> Result<BTreeSet<String>, SettingsError> {
    let wrong = |key: String, expected: &str| SettingsError::Value {
        path: path.to_owned(),
        key,
        expected: expected.to_owned(),
    };
    let Value::Table(packages) = value else {
        return Err(wrong("packages".to_owned(), "tables, one for each package, as `[packages.blink]`"));
    };
    let mut optional = BTreeSet::new();
    for (name, keys) in packages {
        let Value::Table(keys) = keys else {
            return Err(wrong(format!("packages.{name}"), "a table, with `optional = true`"));
        };
        for (key, value) in keys {
            match (key.as_str(), value) {
                ("optional", Value::Boolean(true)) => _ = optional.insert(name.clone()),
                ("optional", Value::Boolean(false)) => {}
                ("optional", _) => {
                    return Err(wrong(format!("packages.{name}.optional"), "`true` or `false`"));
                }
                _ => return Err(unknown(path, key, &["optional"])),
            }
        }
    }
    Ok(optional)
}

fn unknown(path: &Path, key: String, known: &'static [&'static str]) -> SettingsError {
    let meant = closest(&key, known);
    SettingsError::UnknownKey { path: path.to_owned(), key, meant, known }
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
            rollout: RolloutSettings::default(),
            firmware: BTreeMap::new(),
            optional: BTreeSet::new(),
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
            parse("release = 1").unwrap_err(),
            "channel file `dev/channel.toml` has unknown key `release`"
        );
    }

    #[test]
    fn a_rollout_is_described_as_on_the_command_line() {
        let text = "[rollout]\nsteps = \"1%,10%,100%\"\nwait = \"5m\"\nmax-failures = 2.5\nmin-success = \"90%\"\n\
            rollback-on-failure = true\nonly = \"label.room = kitchen\"\nnot-before = 2026-12-01T23:00:00+01:00\nwindow = \"22:00-04:00\"\njitter = \"10m\"\n\
            optional = true\n";
        let policy = parse(text).unwrap().rollout.policy().unwrap();
        assert_eq!(
            policy.steps.iter().map(|step| step.hundredths()).collect::<Vec<_>>(),
            [100, 1000, 10_000]
        );
        assert_eq!((policy.wait, policy.patience, policy.jitter), (300, 900, 600));
        assert_eq!((policy.max_failures.hundredths(), policy.min_success.hundredths()), (250, 9000));
        assert_eq!((policy.on_failure, policy.optional), (OnFailure::RollBack, true));
        assert_eq!(policy.not_before, "2026-12-01T22:00:00Z".parse().ok());
        let given = RolloutSettings { wait: Some(60), ..RolloutSettings::default() };
        let both = given.or(parse(text).unwrap().rollout).policy().unwrap();
        assert_eq!((both.wait, both.jitter), (60, 600), "the command line counts before the file");
        for (text, word) in [
            ("[rollout]\nstep = \"1%\"", "`rollout.step` (did you mean `steps`?)"),
            ("[rollout]\nsteps = \"1%,x\"", "`rollout.steps` should be percentages"),
            ("[rollout]\nwait = \"ten\"", "`rollout.wait` should be a time"),
            ("[rollout]\nonly = \"size = 1\"", "`size` is no field"),
            ("[rollout]\njitter = \"25h\"", "at most a day"),
            ("[rollout]\nwindow = \"22-04\"", "a window"),
            ("[rollout]\nnot-before = \"2026-12-01\"", "a time with its offset from UTC"),
            ("[rollout]\nnot-before = 2026-12-01T22:00:00", "a time with its offset from UTC"),
            ("rollout = 1", "should be a table"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
        for steps in ["10%,1%", "0%,100%", "50%,50%"] {
            let text = format!("[rollout]\nsteps = \"{steps}\"");
            assert!(parse(&text).unwrap().rollout.policy().is_err(), "{steps}");
        }
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
    fn what_is_said_of_an_image_is_read() {
        let settings =
            parse("[firmware.\"esp32.bin\"]\nname = \"thing\"\nversion = \"1.10\"\ntarget = \"esp32-eth\"\n");
        let text = |text: &str| Some(text.to_owned());
        let given = Given { name: text("thing"), version: text("1.10"), target: text("esp32-eth") };
        assert_eq!(settings.map(|settings| settings.firmware), Ok([("esp32.bin".to_owned(), given)].into()));
        for (text, word) in [
            ("firmware = \"esp32.bin\"", "`firmware` should be tables"),
            ("[firmware]\n\"esp32.bin\" = \"1.0\"", "`firmware.\"esp32.bin\"` should be a table"),
            ("[firmware.\"a.bin\"]\nversion = 1.10", "`firmware.\"a.bin\".version` should be a text"),
            ("[firmware.\"a.bin\"]\nversoin = \"1\"", "`versoin` (did you mean `version`?)"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
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
    fn packages_that_are_optional_are_named_in_tables() {
        let text = "[packages.blink]\noptional = true\n[packages.led]\noptional = false\n";
        assert_eq!(parse(text).unwrap().optional, ["blink".to_owned()].into());
        for (text, word) in [
            ("packages = true", "`packages` should be tables"),
            ("packages = { blink = true }", "`packages.blink` should be a table"),
            ("[packages.blink]\noptional = 1", "`packages.blink.optional` should be `true` or `false`"),
            ("[packages.blink]\noptinal = true", "did you mean `optional`?"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
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
