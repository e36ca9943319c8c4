//! Who steers a rollout, where several want to: whoever is named last on a retained topic.
//!
//! Each claims it with a last will that clears it. A broker gives all messages of one topic to everybody in the same
//! order, so all agree on who was last. Who finds it held waits until it is cleared; who claimed it acts only after it has been
//! the last for [`limits::LEASE_SETTLES`]: by then whoever claimed it at the same time has been heard.

use std::time::Duration;

use crate::limits;

/// The lease, as one of those who want it sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    own: String,
    holder: Option<String>,
    claimed: bool,
    held_since: Option<Duration>,
}

impl Lease {
    /// Nothing is known yet. `own` names the one who wants it, as no other.
    #[must_use]
    pub fn new(own: String) -> Lease {
        Lease { own, holder: None, claimed: false, held_since: None }
    }

    /// The name of the one who wants it.
    #[must_use]
    pub fn own(&self) -> &str {
        &self.own
    }

    /// The topic says this now.
    pub fn heard(&mut self, now: Duration, payload: &[u8]) {
        let holder = String::from_utf8_lossy(payload).into_owned();
        self.holder = Some(holder).filter(|holder| !holder.is_empty());
        self.claimed = false;
        let is_own = self.holder.as_ref() == Some(&self.own);
        self.held_since = if is_own { self.held_since.or(Some(now)) } else { None };
    }

    /// Whether it is to be claimed now; it is taken for done.
    pub fn claims(&mut self) -> bool {
        let claims = self.holder.is_none() && !self.claimed;
        self.claimed |= claims;
        claims
    }

    /// Whether its owner may act now.
    #[must_use]
    pub fn is_held(&self, now: Duration) -> bool {
        self.held_since.is_some_and(|since| now >= since + limits::LEASE_SETTLES)
    }

    /// Who else has it.
    #[must_use]
    pub fn other(&self) -> Option<&str> {
        self.holder.as_deref().filter(|holder| *holder != self.own)
    }

    /// The connection is lost: the broker clears what was claimed on it.
    pub fn lost(&mut self) {
        *self = Lease::new(std::mem::take(&mut self.own));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_secs(10);
    const SETTLED: Duration = Duration::from_secs(10 + limits::LEASE_SETTLES.as_secs());

    #[test]
    fn of_two_who_claim_at_once_the_last_one_holds_it() {
        let mut both = ["a", "b"].map(|name| Lease::new(name.to_owned()));
        assert!(both.iter_mut().all(Lease::claims), "neither has heard of the other");
        for claim in ["b", "a"] {
            both.iter_mut().for_each(|lease| lease.heard(NOW, claim.as_bytes()));
        }
        assert_eq!(both.each_ref().map(|lease| lease.is_held(SETTLED)), [true, false]);
        assert_eq!(both[1].other(), Some("a"));
        assert!(!both[1].claims());
    }

    #[test]
    fn nobody_acts_before_others_could_be_heard() {
        let mut lease = Lease::new("a".to_owned());
        assert!(lease.claims() && !lease.claims(), "one claim is enough");
        lease.heard(NOW, b"a");
        assert!(!lease.is_held(NOW) && lease.is_held(SETTLED));
        lease.heard(SETTLED, b"b");
        assert!(!lease.is_held(SETTLED + SETTLED));
    }

    #[test]
    fn what_is_cleared_is_claimed_by_those_who_wait_and_by_who_had_it() {
        let mut waits = Lease::new("b".to_owned());
        waits.heard(NOW, b"a");
        assert!(!waits.claims());
        waits.heard(NOW, b"");
        assert!(waits.claims());
        let mut held = Lease::new("a".to_owned());
        held.heard(NOW, b"a");
        // The last will of its own connection before this one.
        held.heard(SETTLED, b"");
        assert!(!held.is_held(SETTLED) && held.claims());
    }

    #[test]
    fn after_a_lost_connection_everything_is_asked_again() {
        let mut lease = Lease::new("a".to_owned());
        lease.heard(NOW, b"a");
        lease.lost();
        assert!(!lease.is_held(SETTLED) && lease.claims());
    }
}
