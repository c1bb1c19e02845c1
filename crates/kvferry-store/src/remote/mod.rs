//! The remote tier: objects in an engine that other servers share, found by their keys.
//!
//! What the remote holds is known to no index here, as others write there too: a lookup asks for the chunks that it
//! lacks in one question. Requests run on threads of their own, each with a deadline, bounded in number and in bytes.
//! A keeper asks the remote every few seconds whether it answers and takes objects; while it does not, everything
//! is refused at once, and the keeper's is the one request that finds out when it is back. `docs/remote.md` has the
//! keys, the promises and the settings.

mod keeper;
mod keys;
mod shared;
#[cfg(test)]
pub(crate) mod tests;
mod work;

use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use kvferry_core::cache::Memory;
use kvferry_core::{Error, Result};
use tokio::runtime::Runtime;

use crate::disk::{LoadDone, Saved, SummedDone};
use crate::index::ObjectId;
use crate::latencies::Latencies;
use shared::{LoadTask, SaveTask, Shared};

/// Threads on which requests run; they wait for the remote together.
const THREADS: usize = 2;
/// How long a drop waits for what is under way.
const DROP_WAIT: Duration = Duration::from_secs(10);
/// How long a start waits to know whether the remote answers.
const START_WAIT: Duration = Duration::from_secs(2);

/// What a request to a remote comes to.
pub type RemoteFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T>> + Send + 'a>>;

/// The bytes of leading values, as an engine tells them: those that it has told when its time is over are the answer.
#[derive(Debug, Default)]
pub struct Lengths(Mutex<Vec<u64>>);

impl Lengths {
    /// The next value is there and has so many bytes.
    pub fn tell(&self, bytes: u64) {
        self.lock().push(bytes);
    }

    fn lock(&self) -> MutexGuard<'_, Vec<u64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An engine that keeps values by keys. An error of [`kvferry_core::ErrorCode::Unreachable`] or
/// [`kvferry_core::ErrorCode::Timeout`] says that it may answer another time; any other that it refuses the request.
/// A request that is dropped has no further effect than one whose answer was lost.
pub trait Objects: Send + Sync {
    /// Tells the bytes of the leading values that are there, each as soon as it is known; what comes after one that is not
    /// need not be asked for.
    fn lengths<'a>(&'a self, keys: Vec<String>, told: &'a Lengths) -> RemoteFuture<'a, ()>;
    /// The value; `None`: it is not there.
    fn get(&self, key: String) -> RemoteFuture<'_, Option<Bytes>>;
    /// Puts the value, in place of any that is there.
    fn put(&self, key: String, value: Bytes) -> RemoteFuture<'_, ()>;
    /// Puts the value unless there is one; whether it did. An engine that cannot tell puts it.
    fn put_new(&self, key: String, value: Bytes) -> RemoteFuture<'_, bool>;
    /// Takes the value out; one that is not there is no error.
    fn remove(&self, key: String) -> RemoteFuture<'_, ()>;
    /// Where it is, for people: no credentials.
    fn place(&self) -> &str;
}

/// How a remote is set up.
#[derive(Clone)]
pub struct RemoteOptions {
    /// The engine.
    pub objects: Arc<dyn Objects>,
    /// Begins every key: servers with the same prefix share what they store. 1 to 200 of the characters `A-Z a-z
    /// 0-9 . _ - / :`.
    pub prefix: String,
}

impl fmt::Debug for RemoteOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} under {:?}", self.objects.place(), self.prefix)
    }
}

/// What a remote did and could not do. What it holds, it says itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RemoteStatus {
    /// Where it is, without credentials.
    pub place: String,
    /// Bytes of saves that are waiting or being written.
    pub queue_bytes: u64,
    /// Loads that are waiting or running.
    pub queue_loads: u64,
    /// Objects written.
    pub saves: u64,
    /// Saves of what was there already: nothing was written.
    pub known_saves: u64,
    /// Accepted saves that failed.
    pub save_failures: u64,
    /// Saves refused because the queue was full.
    pub dropped_full: u64,
    /// Saves refused because the remote did not answer or took nothing.
    pub dropped_failed: u64,
    /// Saves refused because the bytes had another checksum than they were stored with.
    pub dropped_damaged: u64,
    /// Loads refused because too many were waiting or the remote did not answer.
    pub refused_loads: u64,
    /// Objects loaded.
    pub loads: u64,
    /// Loads that failed.
    pub load_failures: u64,
    /// Objects that were gone between the question and the load.
    pub missing: u64,
    /// Values that were not what was written: misses, and removed.
    pub damaged: u64,
    /// Questions of lookups.
    pub questions: u64,
    /// Those that were not answered in time.
    pub question_failures: u64,
    /// Requests that were sent again.
    pub retries: u64,
    /// How often it stopped answering or taking objects.
    pub outages: u64,
    /// Bytes of values written.
    pub written_bytes: u64,
    /// Bytes of values read.
    pub read_bytes: u64,
    /// Why it does not answer, or takes nothing, just now.
    pub failed: Option<String>,
    /// What the keeper's latest round took, and when it ended; `None` before the first.
    pub probe: Option<(Duration, Instant)>,
    /// From a request to its answer, each try by itself: questions, loads and saves, by these names.
    pub latencies: Vec<(&'static str, Latencies)>,
}

impl RemoteStatus {
    /// The numbers, by the names that operators see.
    pub fn figures(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("remote_queue_bytes", self.queue_bytes),
            ("remote_queue_loads", self.queue_loads),
            ("remote_saves", self.saves),
            ("remote_known_saves", self.known_saves),
            ("remote_save_failures", self.save_failures),
            ("remote_dropped_full", self.dropped_full),
            ("remote_dropped_failed", self.dropped_failed),
            ("remote_dropped_damaged", self.dropped_damaged),
            ("remote_refused_loads", self.refused_loads),
            ("remote_loads", self.loads),
            ("remote_load_failures", self.load_failures),
            ("remote_missing", self.missing),
            ("remote_damaged", self.damaged),
            ("remote_questions", self.questions),
            ("remote_question_failures", self.question_failures),
            ("remote_retries", self.retries),
            ("remote_outages", self.outages),
            ("remote_written_bytes", self.written_bytes),
            ("remote_read_bytes", self.read_bytes),
        ]
    }
}

/// The times and bounds of a remote, which tests make smaller.
#[derive(Debug, Clone)]
pub(crate) struct Times {
    /// One try of a question or of a removal.
    pub(crate) question: Duration,
    /// One try of a load or a save.
    pub(crate) transfer: Duration,
    /// Before the second try; twice as long before the third, each less a random half.
    pub(crate) backoff: Duration,
    /// Between two rounds of the keeper.
    pub(crate) period: Duration,
    /// The same after a failure; twice as long after each further one, up to the period.
    pub(crate) retry: Duration,
    /// KiB that loads may hold at once beside the pool, and saves as many.
    pub(crate) in_flight_kib: u32,
}

impl Default for Times {
    fn default() -> Self {
        Self {
            question: Duration::from_secs(1),
            transfer: Duration::from_secs(10),
            backoff: Duration::from_millis(50),
            period: Duration::from_secs(10),
            retry: Duration::from_secs(1),
            in_flight_kib: 256 << 10,
        }
    }
}

/// How many of the objects that were asked for are there, counted from the first. Called once, on a thread of the remote.
pub(crate) type Found = Box<dyn FnOnce(usize) + Send>;

/// Objects in a shared engine. Dropping it ends it as [`Remote::close`] does.
pub(crate) struct Remote {
    shared: Arc<Shared>,
    runtime: Option<Runtime>,
}

impl Remote {
    /// Begins to keep in touch with the engine. One that does not answer is no error.
    pub(crate) fn open(options: RemoteOptions, queue_bytes: u64) -> Result<Self> {
        Self::open_with(options, queue_bytes, Times::default())
    }

    pub(crate) fn open_with(
        options: RemoteOptions,
        queue_bytes: u64,
        times: Times,
    ) -> Result<Self> {
        keys::check_prefix(&options.prefix)?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(THREADS)
            .thread_name("kvferry-remote")
            .enable_all()
            .build()
            .map_err(|error| Error::system("cannot start the threads of the remote", &error))?;
        let shared = Arc::new(Shared::new(options, queue_bytes, times)?);
        runtime.spawn(keeper::run(Arc::clone(&shared)));
        for _ in 0..work::SAVERS {
            runtime.spawn(work::save(Arc::clone(&shared)));
        }
        for _ in 0..work::LOADERS {
            runtime.spawn(work::load(Arc::clone(&shared)));
        }
        for _ in 0..work::REMOVERS {
            runtime.spawn(work::remove(Arc::clone(&shared)));
        }
        // Where it answers, what is asked for at once is found.
        shared.wait_for_first_round(Instant::now() + START_WAIT);
        Ok(Self { shared, runtime: Some(runtime) })
    }

    /// Whether anything may be asked of it just now.
    pub(crate) fn answers(&self) -> bool {
        self.shared.answers()
    }

    /// Asks how many of these objects are there; each with the bytes of its value, see [`Remote::value_bytes`]. No answer by
    /// `until` is "none". `false`: it is not asked, and `done` is not called.
    #[must_use = "a question that was refused calls nothing back"]
    pub(crate) fn find(&self, objects: Vec<(ObjectId, u64)>, until: Instant, done: Found) -> bool {
        let Some(runtime) = &self.runtime else { return false };
        let Some(question) = self.shared.accept_question(objects, until, done) else {
            return false;
        };
        runtime.spawn(work::find(Arc::clone(&self.shared), question));
        true
    }
}

impl crate::tiers::Tier for Remote {
    fn save(
        &self,
        saved: Saved,
        memory: Arc<dyn Memory>,
        (offset, length): (u64, u64),
        checksum: Option<u64>,
        done: SummedDone,
    ) -> bool {
        let task = SaveTask { saved, memory, offset, length, checksum };
        self.shared.accept_save(task, done)
    }

    fn load(
        &self,
        id: &ObjectId,
        memory: Arc<dyn Memory>,
        (offset, length): (u64, u64),
        done: LoadDone,
    ) -> bool {
        self.shared.accept_load(LoadTask { id: *id, memory, offset, length }, done)
    }

    /// The objects are not loaded any more from now on, and go soon, for all servers.
    fn remove(&self, ids: &[ObjectId]) {
        self.shared.remove(ids);
    }

    /// What was saved until now is not found any more: here at once, by other servers with the same prefix
    /// within the keeper's period. Its bytes stay until the engine evicts them.
    fn clear(&self) {
        self.shared.clear();
    }

    /// Waits until everything that was accepted so far is in the engine, and what was removed is out of it unless it does
    /// not let go of it.
    fn flush(&self, deadline: Instant) -> Result<()> {
        self.shared.flush(deadline)
    }

    fn close(&self, deadline: Instant) -> Result<()> {
        self.shared.close(deadline)
    }
}

impl Remote {
    /// Bytes of the value of an object of `length` bytes with these names.
    pub(crate) fn value_bytes(
        layout: &kvferry_core::key::Layout,
        cache_salt: &str,
        length: u64,
    ) -> u64 {
        keys::value_bytes(layout, cache_salt, length)
    }

    pub(crate) fn status(&self) -> RemoteStatus {
        self.shared.status()
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        let _ = self.shared.close(Instant::now() + DROP_WAIT); // what is left ends with the threads
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background(); // whoever drops it may be a thread of another runtime
        }
    }
}
