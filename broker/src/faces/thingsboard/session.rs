//! One device's session by MQTT: what it asks and what it is to have in, answers out. No socket, no clock, no index.
//!
//! Answers go to the session itself, whatever it subscribed to: the official SDK subscribes to a filter that does not
//! match them.

use std::{collections::VecDeque, sync::Arc};

use bytes::Bytes;
use serde_json::{Map, Value};

use super::{
    ask::{Chunk, Keys, Kind},
    package::{Content, Package, changes},
};
use crate::message::{Part, Payload};

/// Where a device hears that its attributes changed.
pub const ATTRIBUTES: &str = "v1/devices/me/attributes";
/// Where a device hears that it gets no package. There is one for all kinds.
const ERROR: &str = "v2/fw/error";

/// Downloads of one session that are remembered; the longest unused is forgotten first, and starts anew.
const DOWNLOADS: usize = 8;

/// What a device is to have, and what it is told of it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Assigned {
    /// Its firmware.
    pub firmware: Option<Arc<Package>>,
    /// Its software.
    pub software: Option<Arc<Package>>,
    /// Its shared attributes.
    pub shared: Map<String, Value>,
}

/// A message to the device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Its topic.
    pub topic: String,
    /// What it says.
    pub content: Part,
}

/// What became of a request for a piece.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// Here it is.
    Served(Answer),
    /// There is none: the device hears why, and is sent away, as ThingsBoard does.
    Refused(Answer, &'static str),
}

/// The state of a session.
#[derive(Debug)]
pub struct Session {
    assigned: Arc<Assigned>,
    /// The most recently used last.
    downloads: VecDeque<Download>,
}

/// A download that has begun goes on with the package that it began with.
#[derive(Debug)]
struct Download {
    kind: Kind,
    number: u64,
    package: Arc<Package>,
    /// The size of its pieces in bytes, once the device said it.
    size: Option<u64>,
}

impl Session {
    /// The session of a device that is to have this.
    #[must_use]
    pub fn new(assigned: Arc<Assigned>) -> Session {
        Session { assigned, downloads: VecDeque::new() }
    }

    /// What the device is to have.
    #[must_use]
    pub fn assigned(&self) -> &Assigned {
        &self.assigned
    }

    /// Takes what the device is to have from now on; says what to tell it, if it listens.
    pub fn assign(&mut self, assigned: Arc<Assigned>) -> Vec<Answer> {
        let (set, gone) = changes(&self.assigned.shared, &assigned.shared);
        self.assigned = assigned;
        let mut told = Vec::new();
        if !gone.is_empty() {
            let mut deleted = Map::new();
            deleted.insert("deleted".to_owned(), gone.into());
            told.push(Answer::json(ATTRIBUTES.to_owned(), deleted));
        }
        if !set.is_empty() {
            told.push(Answer::json(ATTRIBUTES.to_owned(), set));
        }
        told
    }

    /// The attributes that the device reads. `client` are its own.
    #[must_use]
    pub fn attributes(&self, id: u64, keys: &Keys, client: &Map<String, Value>) -> Answer {
        let found = keys.select(client, &self.assigned.shared);
        Answer::json(format!("{ATTRIBUTES}/response/{id}"), found)
    }

    /// A piece of a package, of at most `most` bytes.
    pub fn chunk(&mut self, chunk: &Chunk, most: u64) -> Piece {
        let Chunk { kind, download, index, size } = *chunk;
        let at = self.downloads.iter().position(|known| (known.kind, known.number) == (kind, download));
        let known = at.and_then(|at| self.downloads.remove(at));
        let size = size.or(known.as_ref().and_then(|known| known.size));
        let package = match known {
            Some(known) => Some(known.package),
            None => match kind {
                Kind::Firmware => self.assigned.firmware.clone(),
                Kind::Software => self.assigned.software.clone(),
            },
        };
        let Some(package) = package else {
            return refused("NOT_FOUND", "there is no package for this device");
        };
        let Content::Image { payload, .. } = &package.content else {
            return refused("FAILURE", "the package for this device is elsewhere");
        };
        let content = part(payload, index, size);
        if size.is_some_and(|size| size > most) || content.len() > most {
            return refused("PAYLOAD_TOO_LARGE", "a piece larger than a packet");
        }
        let topic = format!("v2/{}/response/{download}/chunk/{index}", kind.prefix());
        if self.downloads.len() == DOWNLOADS {
            self.downloads.pop_front();
        }
        self.downloads.push_back(Download { kind, number: download, package, size });
        Piece::Served(Answer { topic, content })
    }
}

/// Piece `index` of a payload in pieces of `size` bytes; all of it is the first piece if nothing says their size. Past
/// the end there are no bytes.
#[must_use]
pub fn part(payload: &Payload, index: u64, size: Option<u64>) -> Part {
    let len = payload.len();
    let size = size.unwrap_or(len);
    let from = index.saturating_mul(size).min(len);
    Part::new(payload.clone(), from, from.saturating_add(size).min(len))
}

fn refused(error: &'static str, reason: &'static str) -> Piece {
    let content = Part::from(Bytes::from_static(error.as_bytes()));
    Piece::Refused(Answer { topic: ERROR.to_owned(), content }, reason)
}

impl Answer {
    fn json(topic: String, object: Map<String, Value>) -> Answer {
        Answer { topic, content: Part::from(Bytes::from(Value::Object(object).to_string())) }
    }
}

#[cfg(test)]
mod tests {
    use mpypi_protocol::Digest;
    use serde_json::json;

    use super::*;

    fn image(version: &str, bytes: &'static [u8]) -> Arc<Package> {
        let content = Content::Image { digest: Digest::of(bytes), payload: Payload::Inline(bytes.into()) };
        Arc::new(Package { title: "dev".into(), version: version.into(), sequence: Some(1), content })
    }

    fn assigned(package: Option<Arc<Package>>) -> Arc<Assigned> {
        let shared =
            package.as_ref().map(|package| json!({"fw_title": "dev", "fw_version": package.version}));
        let shared = shared.and_then(|shared| shared.as_object().cloned()).unwrap_or_default();
        Arc::new(Assigned { firmware: package, software: None, shared })
    }

    fn ask(download: u64, index: u64, size: Option<u64>) -> Chunk {
        Chunk { kind: Kind::Firmware, download, index, size }
    }

    fn served(session: &mut Session, chunk: Chunk) -> (String, Vec<u8>) {
        match session.chunk(&chunk, 1000) {
            Piece::Served(answer) => (answer.topic, bytes(&answer.content)),
            Piece::Refused(answer, reason) => panic!("{answer:?}: {reason}"),
        }
    }

    fn bytes(part: &Part) -> Vec<u8> {
        let Payload::Inline(bytes) = &part.payload else { panic!("a small payload is in memory") };
        bytes[usize::try_from(part.from).unwrap()..usize::try_from(part.to).unwrap()].to_vec()
    }

    fn error(session: &mut Session, chunk: Chunk) -> String {
        match session.chunk(&chunk, 1000) {
            Piece::Refused(answer, _) => {
                assert_eq!(answer.topic, "v2/fw/error");
                String::from_utf8(bytes(&answer.content)).unwrap()
            }
            Piece::Served(answer) => panic!("{answer:?}"),
        }
    }

    #[test]
    fn a_package_comes_in_pieces_of_the_size_that_the_device_said_last() {
        let mut session = Session::new(assigned(Some(image("1", b"0123456789"))));
        let topic = |index| format!("v2/fw/response/3/chunk/{index}");
        assert_eq!(served(&mut session, ask(3, 0, Some(4))), (topic(0), b"0123".to_vec()));
        assert_eq!(served(&mut session, ask(3, 1, None)), (topic(1), b"4567".to_vec()));
        assert_eq!(served(&mut session, ask(3, 2, None)), (topic(2), b"89".to_vec()));
        assert_eq!(served(&mut session, ask(3, 3, None)), (topic(3), b"".to_vec()), "past the end");
        assert_eq!(served(&mut session, ask(3, u64::MAX, Some(1000))).1, b"", "far past the end");
        assert_eq!(served(&mut session, ask(4, 0, None)).1, b"0123456789", "all, if nothing was said");
        assert_eq!(served(&mut session, ask(4, 1, None)).1, b"");
    }

    #[test]
    fn a_download_ends_with_the_package_that_it_began_with() {
        let mut session = Session::new(assigned(Some(image("1", b"old image"))));
        assert_eq!(served(&mut session, ask(1, 0, Some(4))).1, b"old ");
        let told = session.assign(assigned(Some(image("2", b"new image"))));
        assert_eq!(told.len(), 1);
        assert_eq!(told[0].topic, ATTRIBUTES);
        assert_eq!(bytes(&told[0].content), br#"{"fw_title":"dev","fw_version":"2"}"#);
        assert_eq!(served(&mut session, ask(1, 1, None)).1, b"imag");
        assert_eq!(served(&mut session, ask(2, 0, None)).1, b"new image");
        assert!(session.assign(assigned(Some(image("2", b"new image")))).is_empty(), "nothing changed");
        let told = session.assign(assigned(None));
        assert_eq!(bytes(&told[0].content), br#"{"deleted":["fw_title","fw_version"]}"#);
        assert_eq!(served(&mut session, ask(1, 2, None)).1, b"e", "even then");
    }

    #[test]
    fn what_is_not_there_or_too_large_is_refused() {
        let mut session = Session::new(assigned(None));
        assert_eq!(error(&mut session, ask(1, 0, Some(4))), "NOT_FOUND");
        let url = Package {
            title: "dev".into(),
            version: "1".into(),
            sequence: None,
            content: Content::Url("https://github.com/mpypi/dev".into()),
        };
        session.assign(assigned(Some(Arc::new(url))));
        assert_eq!(error(&mut session, ask(1, 0, Some(4))), "FAILURE");
        session.assign(assigned(Some(image("1", b"0123456789"))));
        assert_eq!(error(&mut session, ask(1, 0, Some(1001))), "PAYLOAD_TOO_LARGE");
        assert_eq!(error(&mut session, ask(1, 0, Some(u64::MAX))), "PAYLOAD_TOO_LARGE");
        assert_eq!(served(&mut session, ask(1, 0, Some(1000))).1, b"0123456789");
    }

    #[test]
    fn downloads_without_end_take_no_memory() {
        let mut session = Session::new(assigned(Some(image("1", b"0123456789"))));
        (0..1000).for_each(|number| drop(served(&mut session, ask(number, 0, Some(4)))));
        assert_eq!(session.downloads.len(), DOWNLOADS);
        assert_eq!(served(&mut session, ask(999, 1, None)).1, b"4567", "the latest is known");
        assert_eq!(served(&mut session, ask(0, 0, None)).1, b"0123456789", "the first was forgotten");
    }
}
