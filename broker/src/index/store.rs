//! The database's file: opened, shared by readers, and opened again after a failure.
//!
//! redb takes nothing more once an operation on its file has failed, as on a full disk, until it is opened
//! anew. Whoever reads just then waits for that.

use std::{
    fs::{self, File, TryLockError},
    io::ErrorKind,
    path::{Path, PathBuf},
    sync::{
        Condvar, Mutex, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use redb::{Database, ReadTransaction, ReadableDatabase, WriteTransaction};

use super::IndexError;

/// The file's name.
pub(super) const FILE: &str = "index.redb";
/// Memory for the database's pages, in bytes.
const CACHE: usize = 32 * 1024 * 1024;
/// How long a reader waits for the database to be opened again.
const PATIENCE: Duration = Duration::from_secs(2);

/// The database.
#[derive(Debug)]
pub(super) struct Store {
    folder: PathBuf,
    /// Held to begin a transaction, or to open the database again; `None` if that failed.
    database: RwLock<Option<Database>>,
    /// How often it was opened again. Held to count, and to wait for that.
    renewals: Mutex<u64>,
    renewed: Condvar,
}

impl Store {
    pub(super) fn open(folder: &Path) -> Result<Store, IndexError> {
        let database = RwLock::new(Some(open(folder)?));
        Ok(Store { folder: folder.to_owned(), database, renewals: Mutex::default(), renewed: Condvar::new() })
    }

    /// Reads in one transaction. If the database has failed, reads once more when it is open again.
    pub(super) fn read<T>(
        &self,
        work: impl Fn(&ReadTransaction) -> Result<T, IndexError>,
    ) -> Result<T, IndexError> {
        let seen = *self.renewals.lock().unwrap_or_else(PoisonError::into_inner);
        match self.begin_read().and_then(|transaction| work(&transaction)) {
            Err(error) if error.is_stale() => {
                let renewals = self.renewals.lock().unwrap_or_else(PoisonError::into_inner);
                drop(self.renewed.wait_timeout_while(renewals, PATIENCE, |renewals| *renewals == seen));
                work(&self.begin_read()?)
            }
            done => done,
        }
    }

    pub(super) fn begin_read(&self) -> Result<ReadTransaction, IndexError> {
        let database = self.database.read().unwrap_or_else(PoisonError::into_inner);
        Ok(database.as_ref().ok_or(IndexError::Closed)?.begin_read()?)
    }

    pub(super) fn begin_write(&self) -> Result<WriteTransaction, IndexError> {
        let database = self.database.read().unwrap_or_else(PoisonError::into_inner);
        Ok(database.as_ref().ok_or(IndexError::Closed)?.begin_write()?)
    }

    /// Leaves the database so that whoever opens it after a crash need not repair it, until it is written again.
    /// Every commit could do so, but would take twice as long: one more wait for the disk.
    pub(super) fn rest(&self) -> Result<(), IndexError> {
        let mut transaction = self.begin_write()?;
        transaction.set_quick_repair(true);
        transaction.commit()?;
        Ok(())
    }

    /// Opens the database again. Transactions of before fail from now on.
    pub(super) fn renew(&self) -> Result<(), IndexError> {
        let mut database = self.database.write().unwrap_or_else(PoisonError::into_inner);
        *database = None;
        *database = Some(open(&self.folder)?);
        *self.renewals.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.renewed.notify_all();
        Ok(())
    }
}

fn open(folder: &Path) -> Result<Database, IndexError> {
    let file = folder.join(FILE);
    let failed = |error| match error {
        redb::DatabaseError::DatabaseAlreadyOpen => IndexError::InUse { path: folder.display().to_string() },
        other => IndexError::Database(other.into()),
    };
    if !file.exists() {
        create(folder, &file).map_err(failed)?;
    }
    let mut builder = Database::builder();
    let told = AtomicBool::new(false);
    builder.set_cache_size(CACHE).set_repair_callback(move |_| {
        if !told.swap(true, Ordering::Relaxed) {
            tracing::info!("the index was being written when its broker died: reading all of it");
        }
    });
    builder.open(&file).map_err(failed)
}

/// Makes an empty database as `file` in `folder`. One that a crash left half made would not open: it has its name
/// once it is whole.
fn create(folder: &Path, file: &Path) -> Result<(), redb::DatabaseError> {
    let storage = |error| redb::DatabaseError::Storage(redb::StorageError::Io(error));
    let lock = File::open(folder).map_err(storage)?;
    if let Err(TryLockError::WouldBlock) = lock.try_lock() {
        return Err(redb::DatabaseError::DatabaseAlreadyOpen);
    }
    if file.exists() {
        return Ok(()); // made by another broker, which has it open or has gone
    }
    let beside = file.with_extension("redb.new");
    match fs::remove_file(&beside) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(storage(error)),
        _ => drop(Database::create(&beside)?),
    }
    fs::rename(&beside, file).map_err(storage)
}
