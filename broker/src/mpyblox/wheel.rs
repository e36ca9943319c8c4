//! A wheel as Mpy-BLOX reads it: more strictly than anybody else, and without saying what it did not like.

use std::{collections::HashMap, io::Read};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use flate2::{Crc, read::DeflateDecoder};
use mpypi_protocol::Digest;

/// Bytes that all members of a wheel may have together, unpacked.
const UNPACKED: u64 = 64 * 1024 * 1024;
/// Members of a wheel.
const MEMBERS: usize = 4096;

/// What matters of a wheel that Mpy-BLOX can install.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// `Name` in METADATA.
    pub name: String,
    /// `Version` in METADATA.
    pub version: String,
    /// The last `Tag` in WHEEL: the one that counts.
    pub tag: String,
    /// Its dist-info folder, as `demo-1.0.dist-info`.
    pub folder: String,
    /// Whether RECORD has files in folders below the dist-info folder, as `licenses/`.
    pub is_nested: bool,
}

impl Facts {
    /// Looks at a wheel.
    ///
    /// # Errors
    /// Says why Mpy-BLOX would stop in the middle of installing it.
    pub fn of(wheel: &[u8]) -> Result<Facts, String> {
        let archive = Archive::open(wheel)?;
        // The first one in the archive is the wheel's own.
        let mut folders = archive.names.iter().filter_map(|name| name.strip_suffix("/RECORD"));
        let folder = folders.find(|folder| folder.ends_with(".dist-info"));
        let folder = folder.ok_or("it has no dist-info folder with a RECORD")?.to_owned();
        let text = |name: &str| {
            let bytes = archive.read(&format!("{folder}/{name}"))?;
            String::from_utf8(bytes).map_err(|_| format!("its {name} is no UTF-8"))
        };
        let metadata = headers("METADATA", &text("METADATA")?)?;
        let wheel = headers("WHEEL", &text("WHEEL")?)?;
        let value = |headers: &HashMap<String, String>, file: &str, key: &str| {
            headers.get(key).cloned().ok_or_else(|| format!("its {file} has no `{key}`"))
        };
        let below = format!("{folder}/");
        let mut is_nested = false;
        let mut unpacked = 0;
        for line in text("RECORD")?.lines() {
            let (name, digest, size) = record_line(line)?;
            is_nested |= name.strip_prefix(&below).is_some_and(|rest| rest.contains('/'));
            let content = archive.read(name)?;
            unpacked += content.len() as u64;
            if unpacked > UNPACKED {
                return Err(format!("it unpacks to more than {UNPACKED} bytes"));
            }
            if size.is_some_and(|size| size != content.len() as u64) {
                return Err(format!("`{name}` does not have the size that RECORD says"));
            }
            if digest.is_some_and(|digest| digest != Digest::of(&content)) {
                return Err(format!("`{name}` does not have the digest that RECORD says"));
            }
        }
        Ok(Facts {
            name: value(&metadata, "METADATA", "Name")?,
            version: value(&metadata, "METADATA", "Version")?,
            tag: value(&wheel, "WHEEL", "Tag")?,
            folder,
            is_nested,
        })
    }

    /// Whether an upgrade from this wheel to `new` would end with a folder that cannot be removed, after
    /// which the device no longer finds its packages. It removes `<new's folder name>-<this
    /// version>.dist-info`, and only if nothing but files was in it.
    #[must_use]
    pub fn wedges(&self, new: &Facts) -> bool {
        let name = new.folder.split('-').next().unwrap_or_default();
        self.is_nested || self.folder != format!("{name}-{}.dist-info", self.version)
    }

    /// Whether an upgrade from this wheel may have ended so.
    #[must_use]
    pub fn may_wedge(&self) -> bool {
        self.is_nested || !self.folder.ends_with(&format!("-{}.dist-info", self.version))
    }

    /// Whether the wheel is made for the platform `sysname`, or for any.
    #[must_use]
    pub fn fits(&self, sysname: &str) -> bool {
        let platform = self.tag.rsplit('-').next().unwrap_or_default();
        platform.split('.').any(|platform| platform == "any" || platform == sysname)
    }
}

/// Lines of METADATA or WHEEL: all of them, since anything but `Key: value` is an error there.
fn headers(file: &str, text: &str) -> Result<HashMap<String, String>, String> {
    let split =
        |line: &str| line.split_once(':').map(|(key, value)| (key.to_owned(), value.trim().to_owned()));
    text.lines()
        .enumerate()
        .map(|(n, line)| {
            split(line).ok_or_else(|| format!("line {} of its {file} is not `Key: value`", n + 1))
        })
        .collect()
}

/// Name, digest and size. A quoted name is not understood.
fn record_line(line: &str) -> Result<(&str, Option<Digest>, Option<u64>), String> {
    let bad = || format!("RECORD line `{}` is not `path,sha256=…,size`", line.escape_debug());
    let mut fields = line.rsplitn(3, ',');
    let (Some(size), Some(digest), Some(name)) = (fields.next(), fields.next(), fields.next()) else {
        return Err(bad());
    };
    if name.starts_with('/') || name.split('/').any(|part| part == "..") {
        return Err(format!("RECORD leads out of `/lib` with `{}`", name.escape_debug()));
    }
    let size = match size {
        "" => None,
        size => Some(size.parse().map_err(|_| bad())?),
    };
    let digest = match digest {
        "" => None,
        digest => {
            let base64 = digest.strip_prefix("sha256=").ok_or_else(bad)?;
            let bytes = URL_SAFE_NO_PAD.decode(base64).map_err(|_| bad())?;
            Some(Digest::from(<[u8; 32]>::try_from(bytes).map_err(|_| bad())?))
        }
    };
    Ok((name, digest, size))
}

/// A zip archive, read as strictly as Mpy-BLOX does.
struct Archive<'a> {
    bytes: &'a [u8],
    /// In the archive's order.
    names: Vec<String>,
    members: HashMap<String, Member>,
}

struct Member {
    method: u16,
    crc: u32,
    start: usize,
    packed: usize,
    size: usize,
}

impl Archive<'_> {
    fn open(bytes: &[u8]) -> Result<Archive<'_>, String> {
        let end = bytes.len().checked_sub(22).filter(|end| bytes[*end..].starts_with(b"PK\x05\x06"));
        let end = end.ok_or("it does not end as a zip archive without a comment does")?;
        let count = usize::from(short(bytes, end + 10)?);
        if count > MEMBERS {
            return Err(format!("it has more than {MEMBERS} members"));
        }
        let mut at = long(bytes, end + 16)?;
        let mut archive = Archive { bytes, names: Vec::new(), members: HashMap::new() };
        for _ in 0..count {
            if !bytes.get(at..).is_some_and(|rest| rest.starts_with(b"PK\x01\x02")) {
                return Err(
                    "its zip directory is not where it should be: something precedes the archive".into()
                );
            }
            let [name_size, extra, comment] =
                [28, 30, 32].map(|field| short(bytes, at + field).map(usize::from));
            let (name_size, extra, comment) = (name_size?, extra?, comment?);
            let name = bytes.get(at + 46..at + 46 + name_size).and_then(|name| str::from_utf8(name).ok());
            let name = name.ok_or("a member's name is no UTF-8")?.to_owned();
            let member = Member {
                method: short(bytes, at + 10)?,
                crc: u32::try_from(long(bytes, at + 16)?).unwrap_or_default(),
                // The local header is taken to be as long as this one.
                start: long(bytes, at + 42)? + 30 + name_size + extra,
                packed: long(bytes, at + 20)?,
                size: long(bytes, at + 24)?,
            };
            archive.names.push(name.clone());
            archive.members.insert(name, member);
            at += 46 + name_size + extra + comment;
        }
        Ok(archive)
    }

    fn read(&self, name: &str) -> Result<Vec<u8>, String> {
        let shown = name.escape_debug();
        let member = self.members.get(name).ok_or_else(|| format!("`{shown}` is not in the archive"))?;
        let packed =
            member.start.checked_add(member.packed).and_then(|end| self.bytes.get(member.start..end));
        let packed = packed.ok_or_else(|| format!("`{shown}` lies outside the archive"))?;
        let mut content = Vec::new();
        match member.method {
            0 => content.extend_from_slice(packed),
            8 => {
                let most = (member.size as u64).min(UNPACKED) + 1;
                let inflated = DeflateDecoder::new(packed).take(most).read_to_end(&mut content);
                inflated.map_err(|_| format!("`{shown}` cannot be inflated: are its headers aligned?"))?;
            }
            other => return Err(format!("`{shown}` is compressed with zip's method {other}")),
        }
        let mut crc = Crc::new();
        crc.update(&content);
        match content.len() == member.size && crc.sum() == member.crc {
            true => Ok(content),
            false => Err(format!("`{shown}` is damaged, or its header is not the one in the directory")),
        }
    }
}

fn short(bytes: &[u8], at: usize) -> Result<u16, String> {
    let field = bytes.get(at..at + 2).and_then(|field| field.try_into().ok());
    field.map(u16::from_le_bytes).ok_or_else(|| "it ends too early".to_owned())
}

fn long(bytes: &[u8], at: usize) -> Result<usize, String> {
    let field = bytes.get(at..at + 4).and_then(|field| field.try_into().ok());
    let number = field.map(u32::from_le_bytes).ok_or("it ends too early")?;
    usize::try_from(number).map_err(|_| "it is too large".to_owned())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// How a wheel differs from a good one.
    #[derive(Debug, Clone)]
    pub(crate) struct Make<'a> {
        pub name: &'a str,
        pub version: &'a str,
        pub tag: &'a str,
        pub folder: Option<&'a str>,
        pub metadata: &'a str,
        pub record: &'a str,
        pub licenses: bool,
        pub local_extra: usize,
        pub method: u16,
    }

    impl Default for Make<'_> {
        fn default() -> Self {
            Make {
                name: "demo",
                version: "1.0",
                tag: "py3-none-any",
                folder: None,
                metadata: "",
                record: "",
                licenses: false,
                local_extra: 0,
                method: 0,
            }
        }
    }

    impl Make<'_> {
        pub(crate) fn bytes(&self) -> Vec<u8> {
            let folder = format!("{}-{}.dist-info", self.name, self.version);
            let folder = self.folder.unwrap_or(&folder);
            let metadata = format!("Name: {}\nVersion: {}\n{}", self.name, self.version, self.metadata);
            let wheel = format!("Wheel-Version: 1.0\nTag: other\nTag: {}\n", self.tag);
            let mut members = vec![
                (format!("{}/__init__.py", self.name), format!("V = '{}'\n", self.version)),
                (format!("{folder}/METADATA"), metadata),
                (format!("{folder}/WHEEL"), wheel),
            ];
            if self.licenses {
                members.push((format!("{folder}/licenses/LICENSE"), "free\n".to_owned()));
            }
            let mut record = String::new();
            for (name, content) in &members {
                let digest = URL_SAFE_NO_PAD.encode(Digest::of(content.as_bytes()).as_bytes());
                record += &format!("{name},sha256={digest},{}\n", content.len());
            }
            record += &format!("{folder}/RECORD,,\n{}", self.record);
            members.push((format!("{folder}/RECORD"), record));
            self.zip(&members)
        }

        fn zip(&self, members: &[(String, String)]) -> Vec<u8> {
            let (mut out, mut directory) = (Vec::new(), Vec::new());
            for (name, content) in members {
                let mut crc = Crc::new();
                crc.update(content.as_bytes());
                let size = (content.len() as u32).to_le_bytes();
                let mut fields = [20, 0, self.method, 0, 0].map(u16::to_le_bytes).concat();
                fields.extend([crc.sum().to_le_bytes(), size, size].concat());
                fields.extend((name.len() as u16).to_le_bytes());
                let at = (out.len() as u32).to_le_bytes();
                out.extend([&b"PK\x03\x04"[..], &fields, &(self.local_extra as u16).to_le_bytes()].concat());
                out.extend([name.as_bytes(), &vec![0; self.local_extra], content.as_bytes()].concat());
                directory
                    .extend([&b"PK\x01\x02\x14\0"[..], &fields, &[0; 12], &at, name.as_bytes()].concat());
            }
            let count = (members.len() as u16).to_le_bytes();
            let (size, at) = ((directory.len() as u32).to_le_bytes(), (out.len() as u32).to_le_bytes());
            out.extend(directory);
            out.extend([&b"PK\x05\x06\0\0\0\0"[..], &count, &count, &size, &at, &[0, 0]].concat());
            out
        }
    }

    fn refused(make: &Make<'_>) -> String {
        Facts::of(&make.bytes()).unwrap_err()
    }

    #[test]
    fn what_matters_of_a_good_wheel_is_read() {
        let facts = Facts::of(&Make::default().bytes()).unwrap();
        let expected = Facts {
            name: "demo".into(),
            version: "1.0".into(),
            tag: "py3-none-any".into(),
            folder: "demo-1.0.dist-info".into(),
            is_nested: false,
        };
        assert_eq!(facts, expected);
    }

    #[test]
    fn what_the_device_would_stop_at_is_named() {
        let base = Make::default();
        let table = [
            (Make { metadata: "\nA description\n", ..base.clone() }, "METADATA"),
            (Make { metadata: "\n", ..base.clone() }, "METADATA"),
            (Make { record: "\n", ..base.clone() }, "RECORD line"),
            (Make { record: "\"a,b.py\",,\n", ..base.clone() }, "not in the archive"),
            (Make { record: "../boot.py,,\n", ..base.clone() }, "out of `/lib`"),
            (Make { record: "demo/__init__.py,sha256=AAAA,\n", ..base.clone() }, "RECORD line"),
            (Make { record: "demo/__init__.py,,3\n", ..base.clone() }, "size"),
            (Make { local_extra: 3, ..base.clone() }, "damaged"),
            (Make { method: 12, ..base.clone() }, "method 12"),
            (Make { method: 8, ..base.clone() }, "inflated"),
        ];
        for (make, word) in table {
            assert!(refused(&make).contains(word), "{make:?}: {}", refused(&make));
        }
        let good = base.bytes();
        for (bytes, word) in [
            ([&good[..], b"\n"].concat(), "end as a zip"),
            ([b"#!python\n", &good[..]].concat(), "precedes"),
            (Vec::new(), "end as a zip"),
        ] {
            assert!(Facts::of(&bytes).unwrap_err().contains(word), "{:?}", Facts::of(&bytes));
        }
    }

    #[test]
    fn a_truncated_or_changed_wheel_is_no_reason_to_panic() {
        let good = Make { licenses: true, ..Make::default() }.bytes();
        for at in 0..good.len() {
            let _ = Facts::of(&good[..at]);
            let mut changed = good.clone();
            changed[at] ^= 0xff;
            let _ = Facts::of(&changed);
        }
    }

    #[test]
    fn an_upgrade_wedges_after_folders_in_dist_info_and_after_a_folder_of_another_name() {
        let facts = |make: Make<'_>| Facts::of(&make.bytes()).unwrap();
        let new = facts(Make { version: "2.0", ..Make::default() });
        assert!(!facts(Make::default()).wedges(&new));
        assert!(facts(Make { licenses: true, ..Make::default() }).wedges(&new));
        assert!(facts(Make { folder: Some("Demo-1.0.dist-info"), ..Make::default() }).wedges(&new));
        assert!(facts(Make { folder: Some("demo-1.dist-info"), ..Make::default() }).wedges(&new));
    }

    #[test]
    fn a_wheel_fits_its_platform() {
        let fits = |tag, sysname| Facts::of(&Make { tag, ..Make::default() }.bytes()).unwrap().fits(sysname);
        assert!(fits("py3-none-any", "esp32") && fits("mpy6-bytecode-esp32", "esp32"));
        assert!(!fits("mpy6-bytecode-rp2", "esp32"));
    }
}
