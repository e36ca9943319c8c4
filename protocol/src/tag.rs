//! Compatibility tags: which devices a wheel is for (PEP 425), and which of several wheels a device takes.
//!
//! A tag is `<python>-<abi>-<platform>`, each part a name or several joined by `.`, of which one must fit:
//!
//! | tag | holds | fits |
//! |---|---|---|
//! | none, `py3-none-any` | Python source | every device |
//! | `py3-none-esp32` | Python source | the platform `esp32` |
//! | `mpy6-bytecode-any` | MicroPython bytecode, `.mpy` version 6 | whatever loads `.mpy` version 6 |
//! | `mpy6-bytecode-esp32` | the same | and is the platform `esp32` |
//! | `mpy6_3-xtensawin-any` | machine code too, `.mpy` version 6.3 | `.mpy` version 6.3 on `xtensawin` |
//! | `mpy6-xtensawin-any` | the same, for whoever knows better | any 6.x on `xtensawin` |
//!
//! What a device loads is the number `sys.implementation._mpy` of its MicroPython: the version in bits 0 to 7, the
//! sub-version in bits 8 and 9, the architecture in bits 10 to 13 (docs.micropython.org, "MicroPython .mpy files").
//! The sub-version and the architecture matter to machine code only. Its platform is `sysname` in its info, with
//! `_` for what is no letter or digit, in lower case.

use std::fmt;

use crate::limits;

/// The architectures of machine code in `.mpy` files, by MicroPython's numbers, from 1.
pub const ARCHITECTURES: [&str; 12] = [
    "x86",
    "x64",
    "armv6",
    "armv6m",
    "armv7m",
    "armv7em",
    "armv7emsp",
    "armv7emdp",
    "xtensa",
    "xtensawin",
    "rv32imc",
    "rv64imc",
];

/// The ABI part of bytecode without machine code.
pub const BYTECODE: &str = "bytecode";

/// The platform part of what fits every platform.
pub const ANY: &str = "any";

/// A checked compatibility tag.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag {
    text: String,
}

/// A text is no compatibility tag.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{}` is no tag: use `<python>-<abi>-<platform>`, as `py3-none-any` or `mpy6-bytecode-esp32`", .0.escape_debug())]
pub struct TagError(String);

/// What a device runs, as far as wheels are concerned.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Runtime {
    /// `sys.implementation._mpy`; `None` where no `.mpy` file is loaded.
    pub mpy: Option<u32>,
    /// The platform, as a tag spells it; see [`platform`].
    pub platform: String,
}

/// How well a tag fits a device: the greater, the better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fit {
    /// What the wheel holds.
    pub code: Code,
    /// Whether it is for this platform, not for any.
    pub own_platform: bool,
}

/// What a wheel holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Code {
    /// Python source, which the device compiles.
    Source,
    /// Bytecode.
    Bytecode,
    /// Machine code of this architecture, by MicroPython's number; of several that fit, the greater is the closer.
    Native(u8),
}

impl Tag {
    /// Checks `text` and keeps it.
    ///
    /// # Errors
    /// It is not three parts, each of names of letters, digits and `_` joined by `.`.
    pub fn new(text: impl Into<String>) -> Result<Tag, TagError> {
        let text = text.into();
        let name = |name: &str| {
            !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        };
        let parts = text.split('-').count();
        if parts == 3 && text.len() <= limits::TEXT && text.split('-').flat_map(|p| p.split('.')).all(name) {
            Ok(Tag { text })
        } else {
            Err(TagError(text.chars().take(limits::TEXT).collect()))
        }
    }

    /// The tag as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Every single tag it stands for: python, ABI, platform.
    pub fn singles(&self) -> impl Iterator<Item = (&str, &str, &str)> {
        let mut parts = self.text.split('-');
        let mut part = || parts.next().unwrap_or_default();
        let (python, abi, platform) = (part(), part(), part());
        python.split('.').flat_map(move |python| {
            abi.split('.')
                .flat_map(move |abi| platform.split('.').map(move |platform| (python, abi, platform)))
        })
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Runtime {
    /// Whether a wheel with this tag runs here, and how well it fits. A text that is no tag fits nothing.
    #[must_use]
    pub fn fit(&self, tag: Option<&str>) -> Option<Fit> {
        let Some(tag) = tag else { return Some(Fit { code: Code::Source, own_platform: false }) };
        Tag::new(tag)
            .ok()?
            .singles()
            .filter_map(|(python, abi, platform)| {
                let own_platform = platform == self.platform;
                let code = self.code(python, abi)?;
                (own_platform || platform == ANY).then_some(Fit { code, own_platform })
            })
            .max()
    }

    /// Which of several wheels of one package to take, by its place among their tags: the one that fits best, of
    /// equals the first.
    #[must_use]
    pub fn choose<'a>(&self, tags: impl IntoIterator<Item = Option<&'a str>>) -> Option<usize> {
        let mut best: Option<(Fit, usize)> = None;
        for (place, tag) in tags.into_iter().enumerate() {
            if let Some(fit) = self.fit(tag)
                && best.is_none_or(|(better, _)| fit > better)
            {
                best = Some((fit, place));
            }
        }
        best.map(|(_, place)| place)
    }

    /// What a wheel of this python and ABI holds, if it runs here.
    fn code(&self, python: &str, abi: &str) -> Option<Code> {
        let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
        // PEP 425: `py3` is any Python 3, `py34` Python 3.4 and later. Which of it MicroPython has is for people.
        if let Some(rest) = python.strip_prefix("py3") {
            return (digits(rest) && abi == "none").then_some(Code::Source);
        }
        // PEP 425: "if one is needed the underscore _ is used instead" of the dot.
        let (version, sub_version) = match python.strip_prefix("mpy")?.split_once('_') {
            Some((version, sub_version)) => (version, Some(sub_version)),
            None => (python.strip_prefix("mpy")?, None),
        };
        let number = |text: &str| digits(text).then(|| text.parse::<u32>().ok()).flatten();
        let mpy = self.mpy?;
        if number(version)? != mpy & 0xff {
            return None;
        }
        let sub_version = sub_version.map(|text| number(text).ok_or(())).transpose().ok()?;
        if abi == BYTECODE {
            return Some(Code::Bytecode);
        }
        let native = architecture_number(abi)?;
        let here = ((mpy >> 10) & 0xf) as u8;
        // Each Cortex-M runs what its lesser kin do (py/persistentcode.h, `MPY_FEATURE_ARCH_TEST`).
        let cortex_m = 4..=8;
        let runs =
            native == here || (cortex_m.contains(&native) && cortex_m.contains(&here) && native < here);
        let same = sub_version.is_none_or(|sub_version| sub_version == (mpy >> 8) & 3);
        (runs && same).then_some(Code::Native(native))
    }
}

/// What fits best, as a tag.
impl fmt::Display for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let platform = if self.platform.is_empty() { ANY } else { &self.platform };
        let Some(mpy) = self.mpy else { return write!(f, "py3-none-{platform}") };
        let (version, sub_version) = (mpy & 0xff, (mpy >> 8) & 3);
        match usize::try_from((mpy >> 10) & 0xf).ok().and_then(|number| number.checked_sub(1)) {
            Some(place) if place < ARCHITECTURES.len() => {
                write!(f, "mpy{version}_{sub_version}-{}-{platform}", ARCHITECTURES[place])
            }
            _ => write!(f, "mpy{version}-{BYTECODE}-{platform}"),
        }
    }
}

/// MicroPython's number of an architecture.
#[must_use]
pub fn architecture_number(name: &str) -> Option<u8> {
    ARCHITECTURES.iter().position(|known| *known == name).map(|place| place as u8 + 1)
}

/// How a tag spells the platform of a device whose `os.uname().sysname`, or `sys.platform`, is `sysname`.
#[must_use]
pub fn platform(sysname: &str) -> String {
    let spelled = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '_' };
    sysname.chars().map(spelled).collect()
}
