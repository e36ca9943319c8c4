//! A list, and what is known of the packages in it, whichever node will read it.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
};

use mpypi_protocol::{
    Digest, Entry, PackageId, UpdateList, list::Release, list::Wheel, package::PACKAGES,
    wheel::normalized_name,
};

use super::wheel::Facts;
use crate::{
    index::{Index, IndexError, Step},
    message::Payload,
};

/// Wheels that are remembered.
const WHEELS: usize = 4096;
/// Lists that are remembered.
const LISTS: usize = 16;

/// A list with what is known of its wheels.
#[derive(Debug)]
pub struct Survey {
    /// The digest of the list as it was published.
    pub digest: Digest,
    /// The list.
    pub list: UpdateList,
    /// What is known of each wheel in it, or why it cannot be installed.
    pub wheels: HashMap<Digest, Look>,
}

/// What became of looking at a wheel.
pub type Look = Result<Arc<Facts>, Arc<str>>;

impl Survey {
    /// The list's release, if it has one.
    #[must_use]
    pub fn release(&self) -> Option<&Release> {
        self.list.release()
    }

    /// The wheels, by their normalised names; several for one name are made for different platforms.
    #[must_use]
    pub fn packages(&self) -> BTreeMap<String, Vec<(usize, &Wheel)>> {
        let mut packages: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for (at, entry) in self.list.entries().iter().enumerate() {
            if let Entry::Wheel(wheel) = entry {
                packages.entry(normalized_name(&wheel.name)).or_default().push((at, wheel));
            }
        }
        packages
    }
}

/// Wheels and lists that were looked at lately.
#[derive(Debug, Default)]
pub struct Library {
    wheels: HashMap<Digest, Look>,
    /// The same in the order in which they came.
    order: VecDeque<Digest>,
    lists: VecDeque<Arc<Survey>>,
}

impl Library {
    /// Looks at a list and all its wheels. None if it is no list.
    ///
    /// # Errors
    /// The index fails.
    pub fn survey(
        &mut self,
        index: &Index,
        payload: &Payload,
        now_ms: u64,
    ) -> Result<Option<Arc<Survey>>, IndexError> {
        let bytes = index.payload(payload)?;
        let digest = match payload {
            Payload::Blob(digest, _) => *digest,
            Payload::Inline(_) => Digest::of(&bytes),
        };
        if let Some(known) = self.lists.iter().find(|known| known.digest == digest) {
            return Ok(Some(known.clone()));
        }
        let Ok(list) = UpdateList::parse(&bytes) else { return Ok(None) };
        let mut wheels = HashMap::new();
        for entry in list.entries() {
            if let Entry::Wheel(wheel) = entry {
                wheels.insert(wheel.digest, self.look(index, &wheel.digest, now_ms)?);
            }
        }
        let survey = Arc::new(Survey { digest, list, wheels });
        // What is missing may come.
        if survey.wheels.values().all(|look| !matches!(look, Err(why) if **why == *MISSING)) {
            self.lists.push_front(survey.clone());
            self.lists.truncate(LISTS);
        }
        Ok(Some(survey))
    }

    fn look(&mut self, index: &Index, digest: &Digest, now_ms: u64) -> Result<Look, IndexError> {
        if let Some(known) = self.wheels.get(digest) {
            return Ok(known.clone());
        }
        let Some(message) = index.get(&PackageId::Wheel(*digest).topic(), now_ms)? else {
            return Ok(Err(MISSING.into()));
        };
        let look = Facts::of(&index.payload(&message.payload)?).map(Arc::new).map_err(Arc::from);
        if self.order.len() >= WHEELS
            && let Some(oldest) = self.order.pop_front()
        {
            self.wheels.remove(&oldest);
        }
        self.wheels.insert(*digest, look.clone());
        self.order.push_back(*digest);
        Ok(look)
    }

    /// The wheels in the index that are packages of these names and versions, as far as they can be told.
    ///
    /// # Errors
    /// The index fails.
    pub fn find(
        &mut self,
        index: &Index,
        wanted: &BTreeMap<String, String>,
        now_ms: u64,
    ) -> Result<BTreeMap<String, Arc<Facts>>, IndexError> {
        let mut found = BTreeMap::new();
        if wanted.is_empty() {
            return Ok(found);
        }
        let is_wanted = |facts: &Facts| wanted.get(&facts.name).is_some_and(|version| *version == facts.version);
        for facts in self.wheels.values().flatten().filter(|facts| is_wanted(facts)) {
            found.insert(facts.name.clone(), facts.clone());
        }
        if found.len() == wanted.len() {
            return Ok(found);
        }
        let filter = format!("{PACKAGES}wheel/+");
        let (mut after, mut seen) = (None::<String>, 0);
        while seen < WHEELS {
            match index.next(&filter, after.as_deref(), 0, now_ms)? {
                Step::Found(message) => {
                    seen += 1;
                    let digest = message.topic.rsplit('/').next().and_then(|digest| digest.parse().ok());
                    if let Some(digest) = digest
                        && let Ok(facts) = self.look(index, &digest, now_ms)?
                        && is_wanted(&facts)
                    {
                        found.insert(facts.name.clone(), facts);
                    }
                    after = Some(message.topic.to_string());
                }
                Step::Later(topic) => after = Some(topic),
                Step::End => break,
            }
        }
        Ok(found)
    }
}

/// Why a wheel that is not in the index cannot be installed.
const MISSING: &str = "it is not on this broker";
