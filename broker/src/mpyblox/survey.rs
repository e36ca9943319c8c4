//! A list, and what is known of the packages in it, whichever node will read it.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
};

use mpypi_protocol::{
    Digest, Entry, PackageId, UpdateList, list::Wheel, package::PACKAGES, wheel::normalized_name,
};

use super::{plan::Known, wheel::Facts};
use crate::{
    index::{Index, IndexError, Step},
    message::Payload,
};

/// Wheels that are remembered.
const WHEELS: usize = 4096;
/// Lists that are remembered.
const LISTS: usize = 16;
/// Wheels that are read to find a package, at once.
const READS: usize = 256;
/// Wheels of one name and version that are told apart.
const VARIANTS: usize = 8;
/// How long it is believed which wheel a package came from, in milliseconds: to look takes a look at all of
/// them.
const BELIEVED: u64 = 60_000;

/// A list with what is known of its wheels.
#[derive(Debug)]
pub struct Survey {
    /// The digest of the list as it was published.
    pub digest: Digest,
    /// The list.
    pub list: Arc<UpdateList>,
    /// The places of its wheels, by their normalised names; several for one name are made for different
    /// platforms.
    packages: BTreeMap<String, Vec<usize>>,
    /// What is known of each wheel in it, or why it cannot be installed.
    wheels: HashMap<Digest, Look>,
}

/// What became of looking at a wheel.
pub type Look = Result<Arc<Facts>, Arc<str>>;

impl Survey {
    /// A list, and what is known of its wheels.
    #[must_use]
    pub fn new(digest: Digest, list: Arc<UpdateList>, wheels: HashMap<Digest, Look>) -> Survey {
        let mut packages: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for (at, entry) in list.entries().iter().enumerate() {
            if let Entry::Wheel(wheel) = entry {
                packages.entry(normalized_name(&wheel.name)).or_default().push(at);
            }
        }
        Survey { digest, list, packages, wheels }
    }

    /// The wheels of each package, with their places in the list.
    pub fn packages(&self) -> impl Iterator<Item = Vec<(usize, &Wheel)>> {
        let wheel = |at: &usize| match self.list.entries().get(*at) {
            Some(Entry::Wheel(wheel)) => Some((*at, wheel)),
            _ => None,
        };
        self.packages.values().map(move |places| places.iter().filter_map(wheel).collect())
    }

    /// What is known of a wheel of the list.
    #[must_use]
    pub fn wheel(&self, digest: &Digest) -> Option<&Look> {
        self.wheels.get(digest)
    }
}

/// Wheels and lists that were looked at lately.
#[derive(Debug, Default)]
pub struct Library {
    wheels: HashMap<Digest, Look>,
    /// The same in the order in which they came.
    order: VecDeque<Digest>,
    lists: VecDeque<(Digest, Arc<UpdateList>)>,
    surveys: VecDeque<Arc<Survey>>,
    /// What was found for names and versions of packages.
    finds: HashMap<(String, String), Find>,
}

/// The wheels that a package may have come from, and until when that is believed.
#[derive(Debug)]
struct Find {
    variants: Vec<Arc<Facts>>,
    until: u64,
}

impl Library {
    /// A list. None if it is none.
    ///
    /// # Errors
    /// The index fails.
    pub fn list(
        &mut self,
        index: &Index,
        payload: &Payload,
    ) -> Result<Option<(Digest, Arc<UpdateList>)>, IndexError> {
        let digest = match payload {
            Payload::Blob(digest, _) => *digest,
            Payload::Inline(bytes) => Digest::of(bytes),
        };
        if let Some((_, known)) = self.lists.iter().find(|(known, _)| *known == digest) {
            return Ok(Some((digest, known.clone())));
        }
        let Ok(list) = UpdateList::parse(&index.payload(payload)?) else { return Ok(None) };
        let list = Arc::new(list);
        self.lists.push_front((digest, list.clone()));
        self.lists.truncate(LISTS);
        Ok(Some((digest, list)))
    }

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
        let Some((digest, list)) = self.list(index, payload)? else { return Ok(None) };
        if let Some(known) = self.surveys.iter().find(|known| known.digest == digest) {
            return Ok(Some(known.clone()));
        }
        let mut wheels = HashMap::new();
        for entry in list.entries() {
            if let Entry::Wheel(wheel) = entry {
                wheels.insert(wheel.digest, self.look(index, &wheel.digest, now_ms)?);
            }
        }
        let survey = Arc::new(Survey::new(digest, list, wheels));
        // What is missing may come.
        if survey.wheels.values().all(|look| !matches!(look, Err(why) if **why == *MISSING)) {
            self.surveys.push_front(survey.clone());
            self.surveys.truncate(LISTS);
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
        if let Ok(facts) = &look {
            // Somebody may have it from now on.
            self.finds.remove(&(facts.name.clone(), facts.version.clone()));
        }
        if self.order.len() >= WHEELS
            && let Some(oldest) = self.order.pop_front()
        {
            self.wheels.remove(&oldest);
        }
        self.wheels.insert(*digest, look.clone());
        self.order.push_back(*digest);
        Ok(look)
    }

    /// The wheels in the index that are packages of these names and versions, as far as they can be told:
    /// several for one, if it was made for several platforms or more than once.
    ///
    /// # Errors
    /// The index fails.
    pub fn find(
        &mut self,
        index: &Index,
        wanted: &BTreeMap<String, String>,
        now_ms: u64,
    ) -> Result<Known, IndexError> {
        let mut found = Known::new();
        let mut open = BTreeMap::new();
        for (name, version) in wanted {
            match self.finds.get(&(name.clone(), version.clone())) {
                Some(find) if find.until > now_ms => {
                    found.insert(name.clone(), find.variants.clone());
                }
                _ => drop(open.insert(name, version)),
            }
        }
        if open.is_empty() {
            return Ok(found);
        }
        let filter = format!("{PACKAGES}wheel/+");
        let (mut after, mut reads) = (None::<String>, 0);
        while reads < READS {
            match index.next(&filter, after.as_deref(), 0, now_ms)? {
                Step::Found(message) => {
                    let digest = message.topic.rsplit('/').next().and_then(|digest| digest.parse().ok());
                    if let Some(digest) = digest {
                        reads += usize::from(!self.wheels.contains_key(&digest));
                        let look = self.look(index, &digest, now_ms)?;
                        if let Ok(facts) = look
                            && open.get(&facts.name).is_some_and(|version| **version == facts.version)
                        {
                            let variants = found.entry(facts.name.clone()).or_default();
                            if variants.len() < VARIANTS && !variants.contains(&facts) {
                                variants.push(facts);
                            }
                        }
                    }
                    after = Some(message.topic.to_string());
                }
                Step::Later(topic) => after = Some(topic),
                Step::End => break,
            }
        }
        if self.finds.len() + open.len() > WHEELS {
            self.finds.clear();
        }
        for (name, version) in open {
            let variants = found.get(name).cloned().unwrap_or_default();
            let find = Find { variants, until: now_ms.saturating_add(BELIEVED) };
            self.finds.insert((name.clone(), version.clone()), find);
        }
        Ok(found)
    }
}

/// Why a wheel that is not in the index cannot be installed.
const MISSING: &str = "it is not on this broker";
