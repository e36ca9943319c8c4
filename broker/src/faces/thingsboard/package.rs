//! What a channel is to ThingsBoard's devices: a package with a title and a version, and the attributes that tell of it.

use mpypi_protocol::{ChannelName, Digest, Entry, FilePath, UpdateList, list::Firmware};
use serde_json::{Map, Value};

use super::{ask::Kind, checksum::Algorithm};
use crate::message::Payload;

/// What a channel's list has for such devices.
#[derive(Debug, Clone, PartialEq)]
pub struct Offer {
    channel: ChannelName,
    version: Option<String>,
    /// The number of its release, if it has one.
    pub sequence: Option<u64>,
    /// The list's release alone: it says whose turn it is.
    pub release: UpdateList,
    images: Vec<Firmware>,
    /// Its files, for those who update from a git repository.
    pub files: Vec<(FilePath, Digest)>,
}

/// What a device is to have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Package {
    /// `fw_title`: the channel's name.
    pub title: String,
    /// `fw_version`: the release's version, to the letter.
    pub version: String,
    /// The number of the release, if it has one.
    pub sequence: Option<u64>,
    /// What there is to fetch.
    pub content: Content,
}

/// What there is to fetch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// An image, in pieces, from us.
    Image {
        /// Its SHA-256.
        digest: Digest,
        /// Its bytes.
        payload: Payload,
    },
    /// What is at this address.
    Url(String),
}

/// What a list has for a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted<'o> {
    /// This image.
    Image(&'o Firmware),
    /// The channel's files.
    Files,
    /// Nothing.
    Nothing,
}

impl Offer {
    /// What `list` has.
    #[must_use]
    pub fn of(channel: ChannelName, list: &UpdateList) -> Offer {
        let mut offer = Offer {
            channel,
            version: list.release().map(|release| release.version.clone()),
            sequence: list.release().map(|release| release.sequence),
            // What stood in a list stands alone, too.
            release: list
                .release()
                .and_then(|release| UpdateList::new(vec![Entry::Release(release.clone())]).ok())
                .unwrap_or_default(),
            images: Vec::new(),
            files: Vec::new(),
        };
        for entry in list.entries() {
            match entry {
                Entry::Firmware(image) => offer.images.push(image.clone()),
                Entry::Src(file) => offer.files.push((file.path.clone(), file.digest)),
                _ => {}
            }
        }
        offer
    }

    /// What a device with this hardware takes: the image for it, else the one for all, else the only one for whoever
    /// does not say what they are; the files if there is no image at all.
    #[must_use]
    pub fn wanted(&self, target: Option<&str>) -> Wanted<'_> {
        let for_it =
            self.images.iter().find(|image| image.target.is_some() && image.target.as_deref() == target);
        let for_all = || self.images.iter().find(|image| image.target.is_none());
        let only = || match (self.images.as_slice(), target) {
            ([image], None) => Some(image),
            _ => None,
        };
        match for_it.or_else(for_all).or_else(only) {
            Some(image) => Wanted::Image(image),
            None if self.images.is_empty() && !self.files.is_empty() => Wanted::Files,
            None => Wanted::Nothing,
        }
    }

    /// The package that `content` is part of. A list without a release has the image's version.
    #[must_use]
    pub fn package(&self, content: Content, image: Option<&Firmware>) -> Package {
        let version = self.version.clone().or_else(|| image.map(|image| image.version.clone()));
        Package {
            title: self.channel.to_string(),
            version: version.unwrap_or_default(),
            sequence: self.sequence,
            content,
        }
    }
}

impl Package {
    /// Its size in bytes, if it is fetched from us.
    #[must_use]
    pub fn size(&self) -> Option<u64> {
        match &self.content {
            Content::Image { payload, .. } => Some(payload.len()),
            Content::Url(_) => None,
        }
    }

    /// The attributes that tell a device of it. `checksum` is that of an image.
    #[must_use]
    pub fn attributes(&self, kind: Kind, algorithm: Algorithm, checksum: &str) -> Map<String, Value> {
        let text = |text: &str| Value::String(text.to_owned());
        let mut all = vec![
            ("title", text(&self.title)),
            ("version", text(&self.version)),
            ("tag", text(&format!("{} {}", self.title, self.version))),
        ];
        match &self.content {
            Content::Image { payload, .. } => all.extend([
                ("size", payload.len().into()),
                ("checksum_algorithm", text(algorithm.name())),
                ("checksum", text(checksum)),
            ]),
            Content::Url(url) => all.push(("url", text(url))),
        }
        all.into_iter().map(|(key, value)| (format!("{}_{key}", kind.prefix()), value)).collect()
    }
}

/// What changed between what a device was told and what it is to be told: the new values, and the keys that are gone.
#[must_use]
pub fn changes(old: &Map<String, Value>, new: &Map<String, Value>) -> (Map<String, Value>, Vec<String>) {
    let gone = old.keys().filter(|key| !new.contains_key(*key)).cloned().collect();
    let set = match old == new {
        true => Map::new(),
        // All of them: a device looks at title and version together.
        false => new.clone(),
    };
    (set, gone)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use serde_json::json;

    use super::*;

    fn offer(entries: &str) -> Offer {
        let list = UpdateList::parse(format!("[{entries}]").as_bytes()).unwrap();
        Offer::of(ChannelName::new("dev").unwrap(), &list)
    }

    fn image(name: &str, target: Option<&str>) -> String {
        let target = target.map(|target| format!(r#","target":"{target}""#)).unwrap_or_default();
        let digest = Digest::of(name.as_bytes());
        format!(r#"{{"type":"firmware","name":"{name}","version":"3.1"{target},"pkg_sha256":"{digest}"}}"#)
    }

    const RELEASE: &str = r#"{"type":"release","channel":"dev","sequence":7,"version":"1.10"}"#;

    #[test]
    fn a_device_takes_the_image_for_its_hardware() {
        let file = format!(r#"{{"type":"src","path":"main.py","pkg_sha256":"{}"}}"#, Digest::of(b"x"));
        let several =
            offer(&[image("a", Some("esp32")), image("b", None), image("c", Some("rp2"))].join(","));
        let name = |offer: &Offer, target| match offer.wanted(target) {
            Wanted::Image(image) => image.name.clone(),
            other => format!("{other:?}"),
        };
        assert_eq!(name(&several, Some("rp2")), "c");
        assert_eq!(name(&several, Some("stm32")), "b");
        assert_eq!(name(&several, None), "b");
        let one = offer(&[image("a", Some("esp32")), file.clone()].join(","));
        assert_eq!(name(&one, None), "a");
        assert_eq!(name(&one, Some("rp2")), "Nothing");
        let two = offer(&[image("a", Some("esp32")), image("c", Some("rp2"))].join(","));
        assert_eq!(name(&two, None), "Nothing");
        assert_eq!(name(&offer(&file), None), "Files");
        assert_eq!(name(&offer(""), None), "Nothing");
    }

    #[test]
    fn versions_stay_texts_to_the_letter() {
        let offer = offer(&[RELEASE.to_owned(), image("a", None)].join(","));
        let payload = Payload::Inline(Bytes::from_static(b"abc"));
        let package = offer.package(Content::Image { digest: Digest::of(b"abc"), payload }, None);
        let attributes = package.attributes(Kind::Firmware, Algorithm::Crc32, "c2412435");
        assert_eq!(
            Value::Object(attributes).to_string(),
            r#"{"fw_title":"dev","fw_version":"1.10","fw_tag":"dev 1.10","fw_size":3,"fw_checksum_algorithm":"CRC32","fw_checksum":"c2412435"}"#
        );
        let url = "https://github.com/mpypi/dev".to_owned();
        let attributes =
            offer.package(Content::Url(url), None).attributes(Kind::Software, Algorithm::Sha256, "");
        let expected = json!({
            "sw_title": "dev", "sw_version": "1.10", "sw_tag": "dev 1.10",
            "sw_url": "https://github.com/mpypi/dev"
        });
        assert_eq!(Value::Object(attributes), expected);
    }

    #[test]
    fn a_list_without_a_release_has_the_version_of_its_image() {
        let offer = offer(&image("a", None));
        let Wanted::Image(image) = offer.wanted(None) else { panic!("there is an image") };
        let package = offer.package(Content::Url(String::new()), Some(image));
        assert_eq!((package.version.as_str(), package.sequence), ("3.1", None));
    }

    #[test]
    fn what_is_no_longer_so_is_said_to_be_gone() {
        let map = |value: Value| value.as_object().unwrap().clone();
        let image = map(json!({"fw_title": "dev", "fw_version": "1", "fw_size": 3}));
        let newer = map(json!({"fw_title": "dev", "fw_version": "2", "fw_url": "u"}));
        assert_eq!(changes(&image, &image), (Map::new(), vec![]));
        assert_eq!(changes(&image, &newer), (newer.clone(), vec!["fw_size".to_owned()]));
        let all: Vec<String> = newer.keys().cloned().collect();
        assert_eq!(changes(&newer, &Map::new()), (Map::new(), all));
    }
}
