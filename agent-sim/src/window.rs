//! What is asked for of what is needed, and in which order it is stored. No I/O, no clock.
//!
//! A few messages are asked for at a time. A package in chunks is stored chunk by chunk in their order, which is how the
//! store keeps them: those that come early wait here, and there are never more of them than the window has.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use mpypi_protocol::{Chunks, chunk, limits::SUBSCRIBE_FILTERS};

use crate::{limits, store::Need};

/// What is on its way to a device.
#[derive(Debug, Default)]
pub struct Window {
    waiting: VecDeque<Need>,
    /// What was asked for, in this order, by its topic.
    open: Vec<(String, Item)>,
    /// The package that comes in chunks.
    cut: Option<Cut>,
    /// How many were handed to the store.
    storing: usize,
}

/// What one message holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// The package.
    pub need: Need,
    /// Which chunk of it, if not all.
    pub chunk: Option<u32>,
}

#[derive(Debug)]
struct Cut {
    need: Need,
    chunks: Chunks,
    /// How many are stored.
    stored: u32,
    /// Whether the next one is with the store.
    storing: bool,
    early: BTreeMap<u32, Bytes>,
}

impl Item {
    /// Whether the package is complete with it.
    #[must_use]
    pub fn completes(&self) -> bool {
        match (self.chunk, &self.need.chunks) {
            (Some(number), Some(chunks)) => number + 1 == chunks.count(),
            _ => true,
        }
    }
}

impl Window {
    /// All of `needs` is to be fetched.
    #[must_use]
    pub fn new(needs: Vec<Need>) -> Window {
        Window { waiting: needs.into(), ..Window::default() }
    }

    /// How many packages were not asked for yet.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// The topics of what is asked for next, as far as there is room for it.
    pub fn ask(&mut self) -> Vec<String> {
        let mut topics = Vec::new();
        loop {
            let early = self.cut.as_ref().map_or(0, |cut| cut.early.len());
            if self.open.len() + self.storing + early >= SUBSCRIBE_FILTERS {
                return topics;
            }
            let Some((topic, item)) = self.next() else { return topics };
            topics.push(topic.clone());
            self.open.push((topic, item));
        }
    }

    fn next(&mut self) -> Option<(String, Item)> {
        if self.cut.is_none()
            && let Some(need) = self.waiting.pop_front()
        {
            let Some(chunks) = need.chunks.clone() else {
                return Some((need.id.topic(), Item { need, chunk: None }));
            };
            self.cut = Some(Cut { stored: need.have, chunks, need, storing: false, early: BTreeMap::new() });
        }
        let Some(cut) = &self.cut else { return None };
        let is_asked = |number: &u32| self.open.iter().any(|(_, item)| item.chunk == Some(*number));
        let end = cut.chunks.count().min(cut.stored.saturating_add(limits::CHUNK_WINDOW));
        let first = cut.stored + u32::from(cut.storing);
        let number = (first..end).find(|number| !cut.early.contains_key(number) && !is_asked(number))?;
        let topic = chunk::topic(cut.need.id.digest(), number);
        Some((topic, Item { need: cut.need.clone(), chunk: Some(number) }))
    }

    /// A message came. `None`: nobody asked for it. What is to be stored now, if anything is.
    pub fn take(&mut self, topic: &str, payload: Bytes) -> Option<Option<(Item, Bytes)>> {
        let at = self.open.iter().position(|(open, _)| open == topic)?;
        let (_, item) = self.open.remove(at);
        let (Some(number), Some(cut)) = (item.chunk, &mut self.cut) else {
            self.storing += 1;
            return Some(Some((item, payload)));
        };
        cut.early.insert(number, payload);
        Some(self.next_chunk())
    }

    /// It is stored. What is to be stored now, if anything is.
    pub fn stored(&mut self, item: &Item) -> Option<(Item, Bytes)> {
        self.storing = self.storing.saturating_sub(1);
        let cut = self.cut.as_mut().filter(|_| item.chunk.is_some())?;
        cut.storing = false;
        cut.stored += 1;
        if cut.stored == cut.chunks.count() {
            self.cut = None;
            return None;
        }
        self.next_chunk()
    }

    /// It was not as it should be, and is asked for once more.
    pub fn again(&mut self, item: &Item) {
        self.storing = self.storing.saturating_sub(1);
        match (&mut self.cut, item.chunk) {
            (Some(cut), Some(_)) => cut.storing = false,
            _ => self.waiting.push_back(item.need.clone()),
        }
    }

    fn next_chunk(&mut self) -> Option<(Item, Bytes)> {
        let cut = self.cut.as_mut().filter(|cut| !cut.storing)?;
        let payload = cut.early.remove(&cut.stored)?;
        cut.storing = true;
        self.storing += 1;
        Some((Item { need: cut.need.clone(), chunk: Some(cut.stored) }, payload))
    }

    /// The topics that were asked for and have not come.
    #[must_use]
    pub fn topics(&self) -> Vec<String> {
        self.open.iter().map(|(topic, _)| topic.clone()).collect()
    }

    /// Whether all has come and is stored.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.waiting.is_empty() && self.open.is_empty() && self.cut.is_none() && self.storing == 0
    }
}

#[cfg(test)]
mod tests {
    use mpypi_protocol::{Digest, PackageId};

    use super::*;

    fn need(bytes: &[u8], size: Option<u64>, have: u32) -> Need {
        let chunks = size.map(|size| Chunks::cut(bytes, size).unwrap());
        Need { id: PackageId::Wheel(Digest::of(bytes)), size: Some(bytes.len() as u64), chunks, have }
    }

    fn number(topic: &str) -> u32 {
        topic.rsplit('/').next().unwrap().parse().unwrap()
    }

    fn stored(taken: Option<(Item, Bytes)>) -> Option<u32> {
        taken.and_then(|(item, _)| item.chunk)
    }

    #[test]
    fn chunks_are_asked_for_in_a_window_and_stored_in_their_order_whatever_the_order_they_come_in() {
        let bytes = [7; 10 * 1024];
        let package = need(&bytes, Some(1024), 2);
        let mut window = Window::new(vec![package.clone()]);
        let topics = window.ask();
        assert_eq!(topics.iter().map(|topic| number(topic)).collect::<Vec<_>>(), [2, 3, 4, 5]);
        assert!(window.ask().is_empty());
        let come = |window: &mut Window, topic: &str| window.take(topic, Bytes::from_static(b"x"));
        // The last one first: it waits, and takes its place in the window.
        assert_eq!(stored(come(&mut window, &topics[3]).unwrap()), None);
        assert_eq!(come(&mut window, &topics[3]), None, "a second one of it");
        assert!(window.ask().is_empty());
        let item = |number| Item { need: package.clone(), chunk: Some(number) };
        assert_eq!(stored(come(&mut window, &topics[0]).unwrap()), Some(2));
        assert_eq!(stored(come(&mut window, &topics[1]).unwrap()), None, "one at a time");
        assert_eq!(stored(window.stored(&item(2))), Some(3));
        assert_eq!(window.ask().iter().map(|topic| number(topic)).collect::<Vec<_>>(), [6]);
        // What was wrong is asked for again, alone.
        window.again(&item(3));
        assert_eq!(window.ask(), [topics[1].clone()]);
        assert_eq!(stored(come(&mut window, &topics[1]).unwrap()), Some(3));
        assert_eq!(stored(window.stored(&item(3))), None);
        assert_eq!(stored(come(&mut window, &topics[2]).unwrap()), Some(4));
        assert_eq!(stored(window.stored(&item(4))), Some(5), "it came early");
        assert!(!window.is_done());
    }

    #[test]
    fn whole_packages_and_those_in_chunks_follow_each_other_until_all_are_stored() {
        let bytes: Vec<u8> = (0..3000_u16).flat_map(u16::to_le_bytes).collect();
        let needs = vec![need(b"a", None, 0), need(&bytes, Some(2048), 0), need(b"b", None, 0)];
        let all = needs.len() - 1 + 3;
        let mut window = Window::new(needs);
        let mut asked = window.ask();
        let mut count = 0;
        while let Some(topic) = asked.pop() {
            assert!(window.topics().len() <= SUBSCRIBE_FILTERS);
            let mut next = window.take(&topic, Bytes::new()).unwrap();
            while let Some((item, _)) = next {
                count += 1;
                next = window.stored(&item);
            }
            asked.extend(window.ask());
        }
        assert_eq!((count, window.is_done()), (all, true));
    }
}
