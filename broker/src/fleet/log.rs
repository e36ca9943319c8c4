//! The last lines that nodes logged, within bounds for each and for all.

use std::collections::{HashMap, VecDeque};

use mpypi_protocol::NodeId;

use super::limits;

/// The last lines of all nodes.
#[derive(Debug, Default)]
pub struct Log {
    nodes: HashMap<NodeId, VecDeque<Line>>,
    /// Whose line came when: its number, and the node.
    order: VecDeque<(u64, NodeId)>,
    bytes: usize,
    number: u64,
}

/// A line that a node logged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// Lines are counted over all nodes, from 1.
    pub number: u64,
    /// When it came, in milliseconds since 1970.
    pub at: u64,
    /// What it says.
    pub text: Box<str>,
}

impl Log {
    /// Takes in the lines of a message.
    pub fn take(&mut self, node: &NodeId, message: &[u8], now: u64) {
        // Of a message with more lines than are kept, the first would be forgotten at once.
        let text = String::from_utf8_lossy(message);
        let lines: Vec<_> = text.lines().rev().take(limits::LINES).collect();
        for line in lines.into_iter().rev() {
            let cut = &line[..line.floor_char_boundary(limits::LINE)];
            self.number += 1;
            self.bytes += cut.len() + node.as_str().len();
            let own = self.nodes.entry(node.clone()).or_default();
            own.push_back(Line { number: self.number, at: now, text: cut.into() });
            self.order.push_back((self.number, node.clone()));
            if own.len() > limits::LINES
                && let Some(oldest) = own.pop_front()
            {
                self.bytes -= oldest.text.len() + node.as_str().len();
            }
        }
        while self.bytes > limits::LOG || self.order.len() > limits::LOG / limits::LINE {
            let Some((number, node)) = self.order.pop_front() else { return };
            // It may have gone already, for a later one of the same node.
            let Some(own) = self.nodes.get_mut(&node) else { continue };
            if own.front().is_some_and(|line| line.number == number)
                && let Some(oldest) = own.pop_front()
            {
                self.bytes -= oldest.text.len() + node.as_str().len();
            }
            if own.is_empty() {
                self.nodes.remove(&node);
            }
        }
    }

    /// The lines of a node after the line of this number, the oldest first.
    pub fn since(&self, node: &NodeId, number: u64) -> impl Iterator<Item = &Line> {
        self.nodes.get(node).into_iter().flatten().filter(move |line| line.number > number)
    }

    /// The number of the last line of all.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Forgets what a node logged.
    pub fn forget(&mut self, node: &NodeId) {
        for line in self.nodes.remove(node).into_iter().flatten() {
            self.bytes -= line.text.len() + node.as_str().len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str) -> NodeId {
        NodeId::new(name).unwrap()
    }

    #[test]
    fn each_node_keeps_its_last_lines_and_all_together_stay_within_bounds() {
        let mut log = Log::default();
        let (one, other) = (node("one"), node("other"));
        log.take(&one, b"first\nsecond\r\n\xff", 7);
        let texts: Vec<_> = log.since(&one, 0).map(|line| &*line.text).collect();
        assert_eq!(texts, ["first", "second", "\u{fffd}"]);
        for _ in 0..limits::LINES {
            log.take(&one, b"again", 8);
        }
        assert_eq!(log.since(&one, 0).count(), limits::LINES);
        assert!(log.since(&one, 0).all(|line| &*line.text == "again"));
        let long = vec![b'x'; 2 * limits::LINE];
        for at in 0..2 * limits::LOG / limits::LINE / limits::LINES {
            for _ in 0..limits::LINES {
                log.take(&node(&format!("node-{at}")), &long, 9);
            }
        }
        assert!(log.bytes <= limits::LOG && log.order.len() <= limits::LOG / limits::LINE);
        assert_eq!(log.since(&one, 0).count(), 0, "the oldest go first");
        log.take(&other, b"here", 10);
        let last = log.number();
        log.take(&other, b"there", 11);
        assert_eq!(log.since(&other, last).count(), 1);
        log.forget(&other);
        assert_eq!(log.since(&other, 0).count(), 0);
    }
}
