//! A fleet and its bad day, as a TOML file describes them.

use std::{collections::BTreeMap, fmt, str::FromStr, time::Duration};

use mpypi_client::args::parse_time;
use serde::{Deserialize, Deserializer, de::Error as _};

/// What a fleet's nodes are, and what befalls them. Whatever is left out does not happen.
///
/// Times are texts such as `500ms`, `60s` or `5m`; sizes such as `512B`, `20KB` or `4MB`; shares such as `10%`. Where a range
/// stands, as `5ms..40ms`, each node or message has its own value in it.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Profile {
    /// All nodes are switched on within this time.
    pub join: Time,
    /// How often a node asks for the channel's list by itself. Unless given, as devices do: see
    /// [`limits::CHECK`](crate::limits::CHECK).
    pub check: Option<Time>,
    /// The platforms of the nodes, and which share of them is of each.
    pub platforms: BTreeMap<String, Share>,
    /// What `.mpy` files the nodes load, as `--mpy` names it (`6`, `11014`, `none`), and which share of them does.
    pub abi: BTreeMap<Abi, Share>,
    /// What the nodes had before.
    pub history: Past,
    /// Nodes with another agent than this.
    pub agents: Agents,
    /// The way between the broker and each node.
    pub link: Link,
    /// Nodes that read no faster than this: what is for them waits at the broker.
    pub slow: Slow,
    /// Nodes that are off much of the time.
    pub sleep: Sleep,
    /// Nodes whose power fails while they write.
    pub power: Power,
    /// Nodes with no room.
    pub flash: Full,
    /// Nodes whose clock is wrong.
    pub clock: Skew,
    /// What the application does after an update.
    pub application: Application,
    /// Who sits between the broker and each node, and lies.
    pub intruder: Intruder,
}

/// The way between the broker and a node.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Link {
    /// How long a message takes to a node, beside its transmission.
    pub latency: Span<Time>,
    /// Bytes a second that reach a node.
    pub bandwidth: Option<Span<Size>>,
    /// The mean time after which a connection breaks.
    pub disconnects: Option<Time>,
    /// Messages that do not arrive.
    pub lost: Share,
    /// Messages that arrive twice.
    pub duplicated: Share,
    /// Packages of which a byte arrives changed. A changed list would be believed as long as lists are not signed.
    pub corrupted: Share,
    /// Messages that others overtake.
    pub reordered: Share,
}

/// What nodes had before the fleet started. The others start with an empty flash.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Past {
    /// Nodes that had another release, from a list without a number.
    pub used: Share,
    /// Nodes with files of their owner's, one of them `main.py`.
    pub owned: Share,
}

/// Nodes with another agent than this.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Agents {
    /// Nodes whose agent knows nothing of rollouts, optional packages, revoked releases, epochs and roots.
    pub old: Share,
    /// Nodes with Mpy-BLOX 0.6, and a watchdog, whom a broker of ours has to serve. They verify nothing and write in place:
    /// what is lost, garbled or cut off on the way of such a node may spoil it for good, so all that befalls it are slow
    /// links, breaks, messages that come twice or late, and sleep; and it has no past.
    pub mpy_blox: Share,
}

/// Nodes that read slowly.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Slow {
    /// How many.
    pub nodes: Share,
    /// Bytes a second that they take.
    pub bandwidth: Span<Size>,
}

/// Nodes that are off much of the time.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Sleep {
    /// How many.
    pub nodes: Share,
    /// How long they stay connected.
    pub awake: Span<Time>,
    /// How long they are gone.
    pub asleep: Span<Time>,
}

/// Nodes whose power fails while they write.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Power {
    /// How many.
    pub nodes: Share,
    /// How often.
    pub cuts: u32,
    /// At which operation of the flash that changes something, counted from the last cut.
    pub within: u64,
}

/// Nodes with no room, until the faults end.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Full {
    /// How many.
    pub nodes: Share,
    /// What they have free.
    pub free: Span<Size>,
}

/// Nodes whose clock is wrong.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Skew {
    /// How many.
    pub nodes: Share,
    /// By how much, ahead or behind.
    pub by: Span<Time>,
    /// How many have no clock at all.
    pub none: Share,
}

/// What the application does after an update.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Application {
    /// Nodes on which it crashes once before it confirms a release.
    pub crashes: Share,
    /// Nodes on which it always does: a release that breaks them.
    pub broken: Share,
    /// The version of the releases that break them; all if there is none.
    pub broken_version: Option<String>,
}

/// Who sits between the broker and each node, and lies until the faults end. Each share is one of messages: each, as it
/// comes, may be struck. Nodes without keys to verify lists with would believe a forged one, or one changed to something
/// else that is a list: to them, lists come at worst in part.
#[derive(Debug, Clone, Copy, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Intruder {
    /// Packages in whose place other bytes come, as many.
    pub swapped_packages: Share,
    /// Packages and lists that go on and on. Half of the packages are longer than the list says, by up to 64 KiB; all else
    /// never ends, and nothing comes behind it as long as the connection lasts.
    pub endless_data: Share,
    /// Lists in whose place the one before comes, where the node was sent one before.
    pub old_lists: Share,
    /// Lists that come changed: any bit of one that is signed; of another, a part.
    pub corrupted_lists: Share,
    /// Lists in whose place one of the intruder's comes, with a higher sequence. Only where lists are signed.
    pub forged_lists: Share,
}

/// A profile that comes with the program, or one of the user's.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// It is no profile; says where and why.
    #[error("not a fleet's profile")]
    Syntax(#[from] toml::de::Error),
    /// The shares of what a node can be only one of are more than all nodes.
    #[error("the shares of `{key}` make {percent} %")]
    Shares {
        /// The key.
        key: &'static str,
        /// Their sum, in percent.
        percent: u64,
    },
}

impl Profile {
    /// Those that come with the program, by name.
    pub const READY: [(&'static str, &'static str); 4] = [
        ("lab", include_str!("../../profiles/lab.toml")),
        ("home-wifi", include_str!("../../profiles/home-wifi.toml")),
        ("cellular", include_str!("../../profiles/cellular.toml")),
        ("hostile", include_str!("../../profiles/hostile.toml")),
    ];

    /// The text of a profile that comes with the program.
    #[must_use]
    pub fn ready(name: &str) -> Option<&'static str> {
        Profile::READY.iter().find(|(ready, _)| *ready == name).map(|(_, text)| *text)
    }

    /// Reads a profile.
    ///
    /// # Errors
    /// See [`ProfileError`].
    pub fn parse(text: &str) -> Result<Profile, ProfileError> {
        let profile: Profile = toml::from_str(text)?;
        let Past { used, owned } = profile.history;
        let sums: [(_, f64); 4] = [
            ("platforms", profile.platforms.values().map(|share| share.0).sum()),
            ("abi", profile.abi.values().map(|share| share.0).sum()),
            ("history", used.0 + owned.0),
            ("agents", profile.agents.old.0 + profile.agents.mpy_blox.0),
        ];
        match sums.into_iter().find(|(_, sum)| *sum > 1.000_001) {
            Some((key, sum)) => Err(ProfileError::Shares { key, percent: (sum * 100.0).round() as u64 }),
            None => Ok(profile),
        }
    }
}

/// What `.mpy` files a node loads: `sys.implementation._mpy`, if it loads any.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Abi(pub Option<u32>);

impl FromStr for Abi {
    type Err = String;

    fn from_str(text: &str) -> Result<Abi, String> {
        let number = match text.strip_prefix("0x") {
            Some(digits) => u32::from_str_radix(digits, 16),
            None if text == "none" => return Ok(Abi(None)),
            None => text.parse(),
        };
        let wrong =
            |_| "use the number that `sys.implementation._mpy` says on a device, or `none`".to_owned();
        number.map(|number| Abi(Some(number))).map_err(wrong)
    }
}

impl fmt::Display for Abi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(number) => number.fmt(f),
            None => f.write_str("none"),
        }
    }
}

impl<'de> Deserialize<'de> for Abi {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// A part of a whole, from 0 to 1; written in percent.
#[derive(Debug, Clone, Copy, Default, PartialEq, PartialOrd)]
pub struct Share(pub f64);

/// A time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time(pub Duration);

/// A number of bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

/// From one value to another, both included.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Span<T> {
    /// The least.
    pub from: T,
    /// The most.
    pub to: T,
}

impl Span<Time> {
    /// One time in it.
    pub fn draw(&self, rng: &mut fastrand::Rng) -> Duration {
        let micros = |time: Time| u64::try_from(time.0.as_micros()).unwrap_or(u64::MAX);
        Duration::from_micros(rng.u64(micros(self.from)..=micros(self.to)))
    }
}

impl Span<Size> {
    /// One size in it.
    pub fn draw(&self, rng: &mut fastrand::Rng) -> u64 {
        rng.u64(self.from.0..=self.to.0)
    }
}

impl Share {
    /// Whether this is one of them.
    pub fn draw(self, rng: &mut fastrand::Rng) -> bool {
        // Drawn always, so that a share changes nothing about what else is drawn.
        rng.f64() < self.0
    }
}

/// A quantity as people write it.
trait Quantity: Copy + PartialOrd {
    fn read(text: &str) -> Result<Self, String>;
}

impl Quantity for Time {
    fn read(text: &str) -> Result<Time, String> {
        parse_time(text).map(Time)
    }
}

impl Quantity for Size {
    fn read(text: &str) -> Result<Size, String> {
        let wrong = || format!("`{text}` is no size: write one as 512B, 20KB or 4MB");
        let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let number: u64 = text[..split].parse().map_err(|_| wrong())?;
        let unit = match &text[split..] {
            "B" => 1,
            "KB" => 1000,
            "MB" => 1_000_000,
            _ => return Err(wrong()),
        };
        number.checked_mul(unit).map(Size).ok_or_else(|| format!("`{text}` is too much"))
    }
}

impl Quantity for Share {
    fn read(text: &str) -> Result<Share, String> {
        let number = text.strip_suffix('%').and_then(|number| number.parse::<f64>().ok());
        match number {
            Some(percent) if (0.0..=100.0).contains(&percent) => Ok(Share(percent / 100.0)),
            _ => Err(format!("`{text}` is no share: write one from 0% to 100%")),
        }
    }
}

/// Reads a quantity from TOML.
macro_rules! from_text {
    ($($quantity:ty),*) => {$(
        impl<'de> Deserialize<'de> for $quantity {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                Self::read(&String::deserialize(deserializer)?).map_err(D::Error::custom)
            }
        }
    )*};
}

from_text!(Time, Size, Share);

impl<'de, T: Quantity> Deserialize<'de> for Span<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let (from, to) = text.split_once("..").unwrap_or((&text, &text));
        let span = Span {
            from: T::read(from).map_err(D::Error::custom)?,
            to: T::read(to).map_err(D::Error::custom)?,
        };
        match span.from <= span.to {
            true => Ok(span),
            false => Err(D::Error::custom(format!("`{text}` ends before it begins"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_profiles_that_come_with_the_program_are_profiles() {
        for (name, text) in Profile::READY {
            let profile = Profile::parse(text).unwrap_or_else(|error| panic!("{name}: {error:?}"));
            assert_ne!(profile, Profile::default(), "{name}");
        }
        assert!(Profile::ready("home-wifi").is_some() && Profile::ready("moon").is_none());
    }

    #[test]
    fn what_is_left_out_does_not_happen() {
        let profile =
            Profile::parse("join = \"2s\"\n[link]\nlatency = \"5ms..40ms\"\nlost = \"2.5%\"\n").unwrap();
        assert_eq!(profile.join.0, Duration::from_secs(2));
        assert_eq!(profile.link.latency.to.0, Duration::from_millis(40));
        assert_eq!((profile.link.lost, profile.link.corrupted), (Share(0.025), Share(0.0)));
        assert_eq!(profile.power, Power::default());
    }

    #[test]
    fn what_is_no_profile_is_refused_with_the_place_and_the_reason() {
        let cases = [
            ("jion = \"2s\"", "unknown field `jion`"),
            ("join = 2", "expected a string"),
            ("join = \"2 s\"", "use a time as 500ms"),
            ("[link]\nlost = \"120%\"", "0% to 100%"),
            ("[link]\nlatency = \"9s..1s\"", "ends before it begins"),
            ("[link]\nbandwidth = \"9\"", "20KB"),
            ("[platforms]\nesp32 = \"70%\"\nrp2 = \"40%\"", "the shares of `platforms` make 110 %"),
            ("[history]\nused = \"70%\"\nowned = \"40%\"", "the shares of `history` make 110 %"),
            ("[intruder]\nforged-packages = \"1%\"", "unknown field `forged-packages`"),
            ("[agents]\nold = \"70%\"\nmpy-blox = \"40%\"", "the shares of `agents` make 110 %"),
            ("[abi]\nsix = \"70%\"", "`sys.implementation._mpy`"),
        ];
        for (text, reason) in cases {
            let error = Profile::parse(text).unwrap_err();
            let source = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
            assert!(format!("{error}: {source}").contains(reason), "{text}: {error}: {source}");
        }
    }
}
