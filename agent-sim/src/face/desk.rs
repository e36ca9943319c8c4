//! What a face asks of the device, and how the answer comes back. One task owns the device; the faces send it these.

use std::sync::Arc;

use bytes::Bytes;
use mpypi_protocol::Digest;
use tokio::sync::{Mutex, MutexGuard, mpsc, oneshot};

use crate::{
    apps::{Answers, Kind, Order, PackageView, Task},
    device::{FaceOptions, Status},
    firmware::{NotStarted, Origin},
};

/// Questions that wait for the device, at most; who has more to ask waits.
const WAITING: usize = 32;

/// Where an answer goes.
pub type Reply<T> = oneshot::Sender<T>;

/// A question to the device.
#[derive(Debug)]
pub enum Ask {
    /// All packages.
    Packages(Reply<Vec<PackageView>>),
    /// All firmware images.
    Firmware(Reply<Vec<PackageView>>),
    /// All tasks of a kind, newest first.
    Tasks(Kind, Reply<Vec<Task>>),
    /// A task's log, and whether the task is over; `None`: there is no such task.
    Log(Kind, u64, Reply<Option<(String, bool)>>),
    /// The channel's list is to be read again.
    Refresh(Reply<()>),
    /// Something is wanted.
    Order(Order, Reply<Answers>),
    /// A wheel from a file of this machine is to be installed.
    Local {
        /// Its name.
        name: String,
        /// Its version.
        version: String,
        /// Its bytes.
        payload: Bytes,
        /// The task and the version, or why not.
        reply: Reply<Result<(u64, String), String>>,
    },
    /// How the firmware stands.
    Status(Reply<Status>),
    /// About a new firmware.
    Flash(FlashAsk),
}

/// A step of a new firmware on its way to the device.
#[derive(Debug)]
pub enum FlashAsk {
    /// It is to start: its number, or why not, and what is shown then.
    Start(Origin, Reply<Result<u64, (NotStarted, String)>>),
    /// Its bytes begin to come.
    Begin(u64, Option<u64>, Reply<Result<(), String>>),
    /// The next of its bytes.
    Push(u64, Bytes, Reply<Result<(), String>>),
    /// All have come.
    Finish {
        /// Its number.
        session: u64,
        /// The digest it must have.
        expected: Option<Digest>,
        /// What to call it, if it does not say so.
        version: Option<String>,
        /// Whether it is whole.
        reply: Reply<Result<(), String>>,
    },
    /// Its bytes do not come any more, for this cause; without one, they ended early.
    Abort(u64, Option<String>),
    /// It could not be started.
    Fail(String),
}

/// The device's side.
#[derive(Debug, Clone)]
pub struct Desk {
    asks: Arc<Mutex<mpsc::Receiver<Ask>>>,
    options: FaceOptions,
}

/// The faces' side.
#[derive(Debug, Clone)]
pub struct Bell(mpsc::Sender<Ask>);

/// The device does not run any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the device is off")]
pub struct Off;

impl Desk {
    /// The two sides, for a device of which this can be chosen.
    #[must_use]
    pub fn new(options: FaceOptions) -> (Desk, Bell) {
        let (bell, asks) = mpsc::channel(WAITING);
        (Desk { asks: Arc::new(Mutex::new(asks)), options }, Bell(bell))
    }

    /// What can be chosen.
    #[must_use]
    pub fn options(&self) -> &FaceOptions {
        &self.options
    }

    /// The questions, for the one life of the device that answers them now.
    pub(crate) async fn open(&self) -> MutexGuard<'_, mpsc::Receiver<Ask>> {
        self.asks.lock().await
    }
}

impl Bell {
    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// The device is off.
    pub async fn ask<T>(&self, question: impl FnOnce(Reply<T>) -> Ask) -> Result<T, Off> {
        let (reply, answer) = oneshot::channel();
        self.0.send(question(reply)).await.map_err(|_| Off)?;
        answer.await.map_err(|_| Off)
    }

    /// The same, on a thread that may wait.
    ///
    /// # Errors
    /// The device is off.
    pub fn ask_and_block<T>(&self, question: impl FnOnce(Reply<T>) -> Ask) -> Result<T, Off> {
        let (reply, answer) = oneshot::channel();
        self.0.blocking_send(question(reply)).map_err(|_| Off)?;
        answer.blocking_recv().map_err(|_| Off)
    }

    /// Tells the device something to which there is no answer.
    pub async fn tell(&self, ask: Ask) {
        // A device that is off needs not be told.
        let _ = self.0.send(ask).await;
    }

    /// The same, on a thread that may wait.
    pub fn tell_and_block(&self, ask: Ask) {
        let _ = self.0.blocking_send(ask);
    }
}
