//! Which connection has which client id: the newest, once the one before it has gone.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::{access::gate::Login, message::SessionId};

/// For an earlier connection with the same client id to go.
const TAKEOVER: Duration = Duration::from_secs(5);

/// Client ids in use.
#[derive(Debug, Default)]
pub struct Registry {
    last_id: AtomicU64,
    /// Held to look up, put in or take out one client.
    members: Mutex<HashMap<String, Member>>,
    /// Set while the members are held: nobody comes in any more.
    closed: AtomicBool,
}

/// Who has a client id.
#[derive(Debug, Clone)]
pub(crate) struct Member {
    pub(crate) id: SessionId,
    /// Told to go.
    pub(crate) kick: CancellationToken,
    /// Set before it is told to go, if that is because it is no longer let in.
    revoked: Arc<AtomicBool>,
    login: Option<Login>,
    /// Has gone.
    gone: CancellationToken,
}

impl Member {
    /// Whether it was told to go because it is no longer let in.
    pub(crate) fn is_revoked(&self) -> bool {
        self.revoked.load(Ordering::Acquire)
    }
}

/// A place in the registry, left on drop.
pub(crate) struct Membership<'r> {
    registry: &'r Registry,
    client_id: String,
    pub(crate) member: Member,
    /// Who has not gone yet: takes the place back, so that whoever comes next waits for them too.
    earlier: Option<Member>,
}

/// Why a connection did not get its client id.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum NotEntered {
    /// A newer connection has it.
    Replaced,
    /// An earlier connection does not go.
    Occupied,
    /// Another user has it.
    Foreign,
    /// The broker stops.
    Closed,
}

impl Registry {
    /// An id for the next connection. Ask in the order in which connections were accepted: the newest wins.
    pub fn next_id(&self) -> SessionId {
        SessionId(self.last_id.fetch_add(1, Ordering::Relaxed) + 1)
    }

    /// Takes `client_id`, sends away whoever has it ([MQTT-3.1.4-2]), and waits until they have gone, will and
    /// all. Another user is sent away only if the id is ours `by_right`, as a node's is.
    pub(crate) async fn enter(
        &self,
        client_id: &str,
        id: SessionId,
        login: Option<Login>,
        by_right: bool,
    ) -> Result<Membership<'_>, NotEntered> {
        let member = Member {
            id,
            kick: CancellationToken::new(),
            revoked: Arc::default(),
            login,
            gone: CancellationToken::new(),
        };
        let earlier = {
            let mut members = self.lock();
            if self.closed.load(Ordering::Acquire) {
                return Err(NotEntered::Closed);
            }
            if let Some(present) = members.get(client_id) {
                let name = |login: &Option<Login>| login.as_ref().map(|login| login.name.clone());
                if !by_right && present.login.is_some() && name(&present.login) != name(&member.login) {
                    return Err(NotEntered::Foreign);
                }
                if present.id > id {
                    return Err(NotEntered::Replaced);
                }
            }
            members.insert(client_id.to_owned(), member.clone())
        };
        let mut membership =
            Membership { registry: self, client_id: client_id.to_owned(), member, earlier: None };
        if let Some(earlier) = earlier {
            earlier.kick.cancel();
            let gone = earlier.gone.clone();
            membership.earlier = Some(earlier);
            if timeout(TAKEOVER, gone.cancelled()).await.is_err() {
                return Err(NotEntered::Occupied);
            }
            membership.earlier = None;
        }
        match membership.member.kick.is_cancelled() {
            true => Err(NotEntered::Replaced),
            false => Ok(membership),
        }
    }

    /// Sends everyone away, and lets nobody in any more.
    pub(crate) fn close(&self) {
        let members = self.lock();
        self.closed.store(true, Ordering::Release);
        members.values().for_each(|member| member.kick.cancel());
    }

    /// Everyone's login.
    pub(crate) fn logins(&self) -> Vec<Login> {
        self.lock().values().filter_map(|member| member.login.clone()).collect()
    }

    /// Sends away everyone who would not be let in any more.
    pub(crate) fn revoke(&self, still: impl Fn(Option<&Login>) -> bool) {
        for member in self.lock().values() {
            if !still(member.login.as_ref()) {
                member.revoked.store(true, Ordering::Release);
                member.kick.cancel();
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Member>> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Membership<'_> {
    fn drop(&mut self) {
        let mut members = self.registry.lock();
        if members.get(&self.client_id).is_some_and(|member| member.id == self.member.id) {
            match self.earlier.take().filter(|earlier| !earlier.gone.is_cancelled()) {
                Some(earlier) => members.insert(self.client_id.clone(), earlier),
                None => members.remove(&self.client_id),
            };
        }
        // While the registry is held: whoever sees that we have gone finds it so.
        self.member.gone.cancel();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_client_id_passes_to_the_next_only_when_its_holder_has_gone() {
        let registry = Arc::new(Registry::default());
        let first = registry.enter("id", SessionId(1), None, false).await.ok().unwrap();
        let waiting = {
            let registry = registry.clone();
            tokio::spawn(async move { registry.enter("id", SessionId(2), None, false).await.map(drop) })
        };
        first.member.kick.cancelled().await;
        assert!(!waiting.is_finished());
        drop(first);
        assert_eq!(waiting.await.unwrap(), Ok(()));
        assert!(registry.lock().is_empty());
    }

    #[tokio::test]
    async fn of_many_that_want_a_client_id_the_newest_gets_it() {
        let registry = Arc::new(Registry::default());
        let first = registry.enter("id", SessionId(1), None, false).await.ok().unwrap();
        let entering = |n| {
            let registry = registry.clone();
            tokio::spawn(async move { registry.enter("id", SessionId(n), None, false).await.map(drop) })
        };
        let second = entering(2);
        first.member.kick.cancelled().await;
        let third = entering(3);
        while registry.lock()["id"].id != SessionId(3) {
            tokio::task::yield_now().await;
        }
        assert_eq!(entering(2).await.unwrap(), Err(NotEntered::Replaced), "accepted before the third");
        drop(first);
        assert_eq!(second.await.unwrap(), Err(NotEntered::Replaced));
        assert_eq!(third.await.unwrap(), Ok(()));
        assert!(registry.lock().is_empty());
    }

    #[tokio::test]
    async fn who_gives_up_waiting_leaves_the_id_to_its_holder() {
        let registry = Registry::default();
        let first = registry.enter("id", SessionId(1), None, false).await.ok().unwrap();
        // As when the connection ends, or the time is up.
        let gave_up =
            timeout(Duration::from_millis(1), registry.enter("id", SessionId(2), None, false)).await;
        assert!(gave_up.is_err());
        assert_eq!(registry.lock()["id"].id, SessionId(1));
        drop(first);
        assert!(registry.lock().is_empty());
    }
}
