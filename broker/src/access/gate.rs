//! The gate: who a client is. The driver around [`Users`] and [`Devices`]: files, threads for hashing, and patience
//! with those who guess.

use std::{
    collections::HashMap,
    net::IpAddr,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use mpypi_protocol::{ChannelName, Digest, NodeId, digest::Hasher};
use tokio::sync::Semaphore;

use super::{
    Identity, Role,
    devices::{Device, Devices},
    users::{User, Users, UsersError, pretend, stamp},
};
use crate::{clock, listen::tls::ClientCertificate, message::Refusal, packet::Reason};

/// Passwords hashed at once: each takes 19 MiB and a core.
const HASHING: usize = 2;
/// Logins remembered, so that a fleet that comes back need not be hashed again.
const REMEMBERED: usize = 100_000;
/// Addresses whose failures are remembered; the longest unheard of is forgotten first.
const ADDRESSES: usize = 10_000;
/// The pause after a first failure from an address; it doubles with each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Logins under way from one address; more are refused at once. A site behind one address starts together.
const CROWD: u32 = 1024;
/// The same after a failure.
const GUESSES: u32 = 8;
/// After so long without a failure, an address is like any other.
const FORGIVEN: Duration = Duration::from_secs(600);

/// Decides who a client is.
#[derive(Debug)]
pub struct Gate {
    folder: PathBuf,
    /// Held to read or replace the pointer.
    users: RwLock<Arc<Users>>,
    /// Held to read or replace the pointer.
    devices: RwLock<Arc<Devices>>,
    hashing: Semaphore,
    /// Makes remembered logins worthless outside this process.
    secret: [u8; 32],
    /// Held to look up or put in one login.
    remembered: Mutex<HashMap<Digest, User>>,
    /// Held to look up or change one address.
    failures: Mutex<HashMap<IpAddr, Failures>>,
    refused: AtomicU64,
}

/// Who logged in, and as what.
#[derive(Debug, Clone)]
pub struct Login {
    /// The name: a user's, or a node's.
    pub name: String,
    proof: Proof,
    identity: Identity,
}

#[derive(Debug, Clone)]
enum Proof {
    /// The user that the name was then.
    Password(User),
    Certificate(Arc<ClientCertificate>),
    /// The device that the token was for then.
    Token(NodeId, Device),
}

/// What a client shows of itself.
#[derive(Debug, Default)]
pub struct Shown {
    /// A user name.
    pub name: Option<String>,
    /// A password.
    pub password: Option<Bytes>,
    /// A bearer token, whose user need not be named.
    pub token: Option<Bytes>,
    /// A certificate that a trusted authority has signed.
    pub certificate: Option<Arc<ClientCertificate>>,
}

#[derive(Debug, Clone, Copy)]
struct Failures {
    count: u32,
    /// Logins under way.
    waiting: u32,
    last: Instant,
    /// When the next login from there is looked at.
    next: Instant,
}

impl Login {
    /// The device that came in with its token, if it is one.
    #[must_use]
    pub fn device(&self) -> Option<(&NodeId, &Device)> {
        match &self.proof {
            Proof::Token(node, device) => Some((node, device)),
            Proof::Password(_) | Proof::Certificate(_) => None,
        }
    }
}

impl Shown {
    /// What may be a device's token: a name without a password.
    fn as_token(&self) -> Option<&str> {
        let without_password = self.password.as_ref().is_none_or(Bytes::is_empty);
        self.name.as_deref().filter(|_| without_password)
    }
}

impl Gate {
    /// A gate for the users in the data folder.
    ///
    /// # Errors
    /// The files are not in order.
    pub fn open(folder: PathBuf) -> Result<Gate, UsersError> {
        let users = Users::load(&folder)?;
        let devices = Devices::load(&folder)?;
        let mut secret = [0; 32];
        getrandom::fill(&mut secret).map_err(|error| UsersError::Hash(error.to_string()))?;
        Ok(Gate {
            folder,
            users: RwLock::new(Arc::new(users)),
            devices: RwLock::new(Arc::new(devices)),
            hashing: Semaphore::new(HASHING),
            secret,
            remembered: Mutex::default(),
            failures: Mutex::default(),
            refused: AtomicU64::new(0),
        })
    }

    /// Whether clients have to say who they are.
    #[must_use]
    pub fn is_guarded(&self) -> bool {
        !self.users().is_empty()
    }

    /// Logins refused so far.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Whether who came in with this login, or with none, would still be let in, as the same user.
    #[must_use]
    pub fn still_knows(&self, login: Option<&Login>) -> bool {
        let users = self.users();
        let Some(login) = login else { return users.is_empty() };
        match &login.proof {
            Proof::Password(user) => {
                users.get(&login.name) == Some(user)
                    && users.identity(&login.name).as_ref() == Some(&login.identity)
            }
            Proof::Certificate(certificate) => {
                node_of(certificate, &users).is_ok_and(|(_, identity)| identity == login.identity)
            }
            Proof::Token(node, device) => self.devices().get(node) == Some(device),
        }
    }

    /// Says who a client is that comes from `address` and shows this. A name and a password, or a token, count before
    /// a certificate, so that not only nodes can come in where a certificate is required.
    ///
    /// # Errors
    /// Reason 0x86 for a wrong name or password, 0x87 for none or a certificate that is none of a node, 0x89 for an
    /// address that guesses too fast.
    pub async fn identify(
        &self,
        address: IpAddr,
        shown: Shown,
    ) -> Result<(Identity, Option<Login>), Refusal> {
        let users = self.users();
        if let Some(token) = shown.as_token()
            && !self.devices().is_empty()
        {
            match self.device(address, token).await {
                Ok((node, device)) => {
                    let identity = device.identity(&node);
                    let name = node.to_string();
                    let proof = Proof::Token(node, device);
                    return Ok((identity.clone(), Some(Login { name, proof, identity })));
                }
                Err(refusal) if shown.certificate.is_none() => return Err(refusal),
                Err(_) => {}
            }
        }
        let (name, password) = match shown {
            // A token of nobody is a wrong password of a user who does not exist.
            Shown { token: Some(token), .. } if !users.is_empty() => {
                (users.owner(&Digest::of(&token)).unwrap_or_default().to_owned(), token)
            }
            Shown { name: Some(name), password: Some(password), .. } if !users.is_empty() => (name, password),
            Shown { certificate: Some(certificate), .. } => return self.recognise(&users, certificate),
            _ if users.is_empty() => return Ok((Identity::Anyone, None)),
            _ => {
                self.refused.fetch_add(1, Ordering::Relaxed);
                let text = "a user name and a password are needed here";
                return Err(Refusal::new(Reason::NotAuthorized, text));
            }
        };
        let mark = self.mark(&name, &password);
        let user = users.get(&name).cloned();
        let known = self.lock_remembered().get(&mark).cloned();
        let accepted = match (&user, known) {
            (Some(user), Some(known)) if *user == known => true,
            _ => self.check(address, user.clone(), password).await?,
        };
        match (user, users.identity(&name), accepted) {
            (Some(user), Some(identity), true) => {
                let mut remembered = self.lock_remembered();
                if remembered.len() >= REMEMBERED {
                    remembered.clear();
                }
                remembered.insert(mark, user.clone());
                drop(remembered);
                Ok((identity.clone(), Some(Login { name, proof: Proof::Password(user), identity })))
            }
            _ => {
                let refused = self.refused.fetch_add(1, Ordering::Relaxed) + 1;
                tracing::info!(%address, user = %name.escape_debug(), refused, "wrong user name or password");
                Err(Refusal::new(Reason::BadUserNameOrPassword, "wrong user name or password"))
            }
        }
    }

    /// The device whose token this is, that comes from `address`. Who guesses has to wait.
    ///
    /// # Errors
    /// Reason 0x86 for a token of nobody, 0x89 for an address that guesses too fast.
    pub async fn device(&self, address: IpAddr, token: &str) -> Result<(NodeId, Device), Refusal> {
        if let Some((node, device)) = self.devices().find(token.as_bytes()) {
            return Ok((node.clone(), device.clone()));
        }
        let _waiting = self.enqueue(address)?;
        while let Some(pause) = self.turn(address) {
            tokio::time::sleep(pause).await;
        }
        self.failed(address);
        let refused = self.refused.fetch_add(1, Ordering::Relaxed) + 1;
        tracing::info!(%address, refused, "a token of no device");
        Err(Refusal::new(Reason::BadUserNameOrPassword, "a token of no device"))
    }

    /// The address of the git repository that a channel of files is to devices. Who knows it may read the channel: its
    /// owner's name is a secret where clients have to say who they are.
    #[must_use]
    pub fn repository(&self, channel: &ChannelName) -> String {
        format!("https://github.com/{}/{channel}", self.owner(channel))
    }

    /// The owner of that repository.
    #[must_use]
    pub fn owner(&self, channel: &ChannelName) -> String {
        match self.is_guarded() {
            true => self.devices().owner(channel),
            false => "mpypi".to_owned(),
        }
    }

    /// Reads the files whenever they change, until dropped; says each time that they did. Files that are not
    /// in order change nothing.
    pub async fn watch(&self, mut changed: impl FnMut()) {
        /// How often the files are looked at.
        const LOOK: Duration = Duration::from_secs(1);
        let mut seen = stamp(&self.folder);
        loop {
            tokio::time::sleep(LOOK).await;
            let now = stamp(&self.folder);
            if now == seen {
                continue;
            }
            seen = now;
            match Devices::load(&self.folder) {
                Ok(devices) => {
                    tracing::debug!(devices = devices.iter().len(), "devices read again");
                    *self.devices.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(devices);
                }
                Err(error) => tracing::error!(%error, "devices stay as they were"),
            }
            let users = match Users::load(&self.folder) {
                // Nobody at all would open the door to everybody.
                Ok(users) if users.is_empty() && self.is_guarded() => {
                    tracing::error!("the last user is gone: restart the broker to serve without users");
                    Users::nobody()
                }
                Ok(users) => {
                    tracing::info!(users = users.iter().count(), "users and rules read again");
                    users
                }
                Err(error) => {
                    tracing::error!(%error, "users and rules stay as they were");
                    changed();
                    continue;
                }
            };
            *self.users.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(users);
            changed();
        }
    }

    fn recognise(
        &self,
        users: &Users,
        certificate: Arc<ClientCertificate>,
    ) -> Result<(Identity, Option<Login>), Refusal> {
        match node_of(&certificate, users) {
            Ok((name, identity)) => {
                let proof = Proof::Certificate(certificate);
                Ok((identity.clone(), Some(Login { name, proof, identity })))
            }
            Err(problem) => {
                self.refused.fetch_add(1, Ordering::Relaxed);
                Err(Refusal::new(Reason::NotAuthorized, format!("the client's certificate: {problem}")))
            }
        }
    }

    fn users(&self) -> Arc<Users> {
        self.users.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn devices(&self) -> Arc<Devices> {
        self.devices.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Checks a password when it is its turn: after a failure, an address has to wait longer and longer.
    async fn check(&self, address: IpAddr, user: Option<User>, password: Bytes) -> Result<bool, Refusal> {
        let _waiting = self.enqueue(address)?;
        let _place = loop {
            let place = self.hashing.acquire().await;
            match self.turn(address) {
                None => break place,
                Some(pause) => {
                    drop(place);
                    tokio::time::sleep(pause).await;
                }
            }
        };
        let work = move || match user {
            Some(user) => user.accepts(&password),
            None => {
                pretend(&password);
                false
            }
        };
        let accepted = tokio::task::spawn_blocking(work).await.unwrap_or(false);
        if !accepted {
            self.failed(address);
        }
        Ok(accepted)
    }

    /// Counts a login from this address as under way, if it may be.
    fn enqueue(&self, address: IpAddr) -> Result<Waiting<'_>, Refusal> {
        let now = clock::now().instant;
        let mut failures = self.lock_failures();
        failures.retain(|_, known| known.waiting > 0 || now.duration_since(known.last) < FORGIVEN);
        if failures.len() >= ADDRESSES && !failures.contains_key(&address) {
            let idle = failures.iter().filter(|(_, known)| known.waiting == 0);
            let oldest = idle.min_by_key(|(_, known)| known.last).map(|(address, _)| *address);
            oldest.and_then(|address| failures.remove(&address));
        }
        let known =
            failures.entry(address).or_insert(Failures { count: 0, waiting: 0, last: now, next: now });
        if known.waiting >= if known.count == 0 { CROWD } else { GUESSES } {
            return Err(Refusal::new(Reason::ServerBusy, "too many logins from this address are under way"));
        }
        known.waiting += 1;
        Ok(Waiting { gate: self, address })
    }

    /// Takes the turn of this address, or says how long it still has to wait.
    fn turn(&self, address: IpAddr) -> Option<Duration> {
        let now = clock::now().instant;
        let mut failures = self.lock_failures();
        let known = failures.get_mut(&address)?;
        if known.next > now {
            return Some(known.next - now);
        }
        if known.count > 0 {
            known.next = now + pause_after(known.count);
        }
        None
    }

    fn failed(&self, address: IpAddr) {
        let now = clock::now().instant;
        if let Some(known) = self.lock_failures().get_mut(&address) {
            known.count += 1;
            known.last = now;
            known.next = now + pause_after(known.count);
        }
    }

    fn mark(&self, name: &str, password: &[u8]) -> Digest {
        let mut hasher = Hasher::default();
        hasher.update(&self.secret);
        hasher.update(&(name.len() as u64).to_be_bytes());
        hasher.update(name.as_bytes());
        hasher.update(password);
        hasher.finish()
    }

    fn lock_remembered(&self) -> std::sync::MutexGuard<'_, HashMap<Digest, User>> {
        self.remembered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_failures(&self) -> std::sync::MutexGuard<'_, HashMap<IpAddr, Failures>> {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The node that a certificate was made out to, if it may come in now, and its name.
fn node_of(certificate: &ClientCertificate, users: &Users) -> Result<(String, Identity), String> {
    let node = certificate.node()?;
    let name = node.to_string();
    // What is kept for the one must not be handed to the other.
    if users.get(&name).is_some_and(|user| user.role != Role::Node) {
        return Err(format!("`{name}` is a user who is no node"));
    }
    match certificate.is_trusted() {
        true => Ok((name, users.node(node))),
        false => Err("its authority is no longer trusted".to_owned()),
    }
}

/// A login that waits for its turn; also one that gives up has waited.
struct Waiting<'g> {
    gate: &'g Gate,
    address: IpAddr,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if let Some(known) = self.gate.lock_failures().get_mut(&self.address) {
            known.waiting = known.waiting.saturating_sub(1);
        }
    }
}

fn pause_after(failures: u32) -> Duration {
    FIRST_PAUSE.saturating_mul(1 << failures.saturating_sub(1).min(10)).min(LONGEST_PAUSE)
}
