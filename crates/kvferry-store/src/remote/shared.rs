//! What the remote's threads share: the queues, the breaker, the epoch and the counters.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvferry_core::cache::Memory;
use kvferry_core::{Error, ErrorCode, Result};
use tokio::sync::{Notify, Semaphore};

use super::work::{LOADERS, REMOVERS, SAVERS};
use super::{Found, Objects, RemoteOptions, RemoteStatus, Times, keys};
use crate::disk::shared::Done;
use crate::disk::{LoadDone, Loaded, Saved, SummedDone};
use crate::index::ObjectId;
use crate::latencies::Histogram;

/// Saves that may wait, however small.
const SAVES_MAX: usize = 65_536;
/// Loads that may wait. Their bytes have a bound already: each has a place in a pool.
const LOADS_MAX: usize = 65_536;
/// Questions that may be open.
const QUESTIONS_MAX: usize = 256;
/// Objects of one question; a longer prefix is found by the next lookup.
const OBJECTS_MAX: usize = 4_096;
/// Objects that may wait to be taken out; more stay until the remote evicts them.
const REMOVED_MAX: usize = 65_536;
/// Failures in a row after which the remote is taken for gone.
const FAILURES: u32 = 5;

pub(crate) struct SaveTask {
    pub(crate) saved: Saved,
    pub(crate) memory: Arc<dyn Memory>,
    pub(crate) offset: u64,
    pub(crate) length: u64,
    /// What the bytes must have, where it is known.
    pub(crate) checksum: Option<u64>,
}

/// Tells what became of a save, and which one it was.
pub(crate) struct Ticket {
    pub(crate) number: u64,
    done: Done<bool>,
}

pub(crate) struct LoadTask {
    pub(crate) id: ObjectId,
    pub(crate) memory: Arc<dyn Memory>,
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

/// A question that was accepted. Dropping it answers it with "none" unless it was answered.
pub(crate) struct Question {
    shared: Arc<Shared>,
    pub(crate) objects: Vec<(ObjectId, u64)>,
    pub(crate) until: Instant,
    done: Option<Found>,
}

impl Question {
    pub(crate) fn answer(mut self, there: usize) {
        if let Some(done) = self.done.take() {
            done(there);
        }
    }
}

impl Drop for Question {
    fn drop(&mut self) {
        self.shared.lock().open_questions -= 1;
        if let Some(done) = self.done.take() {
            done(0);
        }
    }
}

/// The saves of one object.
#[derive(Default)]
struct Saving {
    count: usize,
    /// Those up to this ticket are overtaken by a removal.
    overtaken: u64,
}

/// What was asked for.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Request {
    Question,
    Load,
    Save,
}

/// Their names for operators, in the same order.
const REQUESTS: [&str; 3] = ["question", "load", "save"];

/// Under the lock.
#[derive(Default)]
pub(crate) struct State {
    loads: VecDeque<(LoadTask, Done<Option<Loaded>>)>,
    loading: u64,
    saves: VecDeque<(SaveTask, Ticket)>,
    /// Saves that were overtaken by a clear.
    overtaken: VecDeque<(SaveTask, Ticket)>,
    queue_bytes: u64,
    tickets: u64,
    /// Tickets of saves that were accepted and have not ended.
    outstanding: BTreeSet<u64>,
    last_failure: Option<Error>,
    open_questions: usize,
    /// Objects that have saves which were accepted and have not ended.
    saving: HashMap<ObjectId, Saving>,
    /// Objects that are not to be loaded though they may be there still, each with the number of its latest removal.
    removed: HashMap<ObjectId, u64>,
    /// Objects that are being loaded, and whether they were removed since that began.
    getting: HashMap<ObjectId, bool>,
    /// Removals that wait. Those that are not the latest are void.
    removals: VecDeque<(ObjectId, u64)>,
    removals_begun: u64,
    removing: usize,
    /// The remote did not take one out: they wait for the keeper's next round.
    removals_wait: bool,
    /// Begins the objects' keys; `None` before the remote was reached.
    epoch: Option<String>,
    /// The remote does not know of it yet.
    epoch_is_new: bool,
    clears: u64,
    /// Why nothing is asked of it.
    unreachable: Option<String>,
    /// Why nothing is saved to it.
    unwritable: Option<String>,
    /// In a row.
    failures: u32,
    /// When a request last succeeded.
    succeeded: Option<Instant>,
    rounds: u64,
    probe: Option<(Duration, Instant)>,
    /// Its counters; the rest is filled in when asked for.
    pub(crate) status: RemoteStatus,
    pub(crate) closing: bool,
    workers: usize,
}

pub(crate) struct Shared {
    pub(crate) objects: Arc<dyn Objects>,
    pub(crate) prefix: String,
    pub(crate) times: Times,
    queue_bytes: u64,
    state: Mutex<State>,
    pub(crate) for_loaders: Notify,
    pub(crate) for_savers: Notify,
    pub(crate) for_removers: Notify,
    pub(crate) for_keeper: Notify,
    pub(crate) loads_in_flight: Semaphore,
    pub(crate) saves_in_flight: Semaphore,
    /// Something ended.
    changed: Condvar,
    latencies: [Histogram; REQUESTS.len()],
    /// Tells this server from others, for the keeper's own key.
    pub(crate) server: u64,
}

impl Shared {
    pub(crate) fn new(options: RemoteOptions, queue_bytes: u64, times: Times) -> Result<Self> {
        let state = State {
            unreachable: Some("it has not answered yet".to_owned()),
            workers: SAVERS + LOADERS + REMOVERS + 1,
            ..State::default()
        };
        let in_flight = times.in_flight_kib as usize;
        Ok(Self {
            objects: options.objects,
            prefix: options.prefix,
            times,
            queue_bytes,
            state: Mutex::new(state),
            for_loaders: Notify::new(),
            for_savers: Notify::new(),
            for_removers: Notify::new(),
            for_keeper: Notify::new(),
            loads_in_flight: Semaphore::new(in_flight),
            saves_in_flight: Semaphore::new(in_flight),
            changed: Condvar::new(),
            latencies: Default::default(),
            server: random()?,
        })
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until something has ended, or the deadline.
    fn wait<'a>(&self, state: MutexGuard<'a, State>, deadline: Instant) -> MutexGuard<'a, State> {
        let left = deadline.saturating_duration_since(Instant::now());
        self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
    }

    pub(crate) fn wait_for_first_round(&self, deadline: Instant) {
        let mut state = self.lock();
        while state.rounds == 0 && Instant::now() < deadline {
            state = self.wait(state, deadline);
        }
    }

    pub(crate) fn answers(&self) -> bool {
        self.lock().answers()
    }

    pub(crate) fn accept_save(&self, task: SaveTask, done: SummedDone) -> bool {
        let mut state = self.lock();
        if state.closing {
            return false;
        }
        if !state.answers() || state.unwritable.is_some() {
            state.status.dropped_failed += 1;
            return false;
        }
        // One that is larger than the queue waits alone: else it would never be there.
        let full = state.queue_bytes > 0 && state.queue_bytes + task.length > self.queue_bytes;
        if full || state.saves.len() >= SAVES_MAX {
            state.status.dropped_full += 1;
            return false;
        }
        state.tickets += 1;
        let ticket = Ticket { number: state.tickets, done: Done::new(done) };
        state.outstanding.insert(ticket.number);
        state.queue_bytes += task.length;
        state.saving.entry(task.saved.id()).or_default().count += 1;
        state.saves.push_back((task, ticket));
        self.for_savers.notify_one();
        true
    }

    pub(crate) fn accept_load(&self, task: LoadTask, done: LoadDone) -> bool {
        let mut state = self.lock();
        if state.closing || !state.answers() || state.loads.len() >= LOADS_MAX {
            state.status.refused_loads += u64::from(!state.closing);
            return false;
        }
        state.loads.push_back((task, Done::new(done)));
        self.for_loaders.notify_one();
        true
    }

    pub(crate) fn accept_question(
        self: &Arc<Self>,
        mut objects: Vec<(ObjectId, u64)>,
        until: Instant,
        done: Found,
    ) -> Option<Question> {
        let mut state = self.lock();
        if !state.answers() || state.open_questions >= QUESTIONS_MAX {
            return None;
        }
        let removed = objects.iter().position(|(id, _)| state.removed.contains_key(id));
        objects.truncate(removed.unwrap_or(objects.len()).min(OBJECTS_MAX));
        if objects.is_empty() {
            return None;
        }
        state.open_questions += 1;
        state.status.questions += 1;
        Some(Question { shared: Arc::clone(self), objects, until, done: Some(done) })
    }

    /// The next save, and its key if it is to be done: a clear that comes later must not find it under a new one.
    /// `None`: there is none just now.
    pub(crate) fn next_save(&self) -> Option<(SaveTask, Ticket, Result<String>)> {
        let mut state = self.lock();
        let overtaken = state.overtaken.pop_front();
        let was_overtaken = overtaken.is_some();
        let (task, ticket) = overtaken.or_else(|| state.saves.pop_front())?;
        if !state.saves.is_empty() || !state.overtaken.is_empty() {
            self.for_savers.notify_one();
        }
        let is_overtaken = was_overtaken || state.is_overtaken(&task.saved.id(), ticket.number);
        let go = match (&state.unreachable, &state.unwritable) {
            _ if is_overtaken => {
                Err(Error::new(ErrorCode::Aborted, "the object was removed before it was saved"))
            }
            _ if state.closing => Err(closed()),
            (Some(reason), _) | (None, Some(reason)) => {
                let error = Error::new(ErrorCode::Unreachable, reason.clone());
                state.status.save_failures += 1;
                state.last_failure = Some(error.clone());
                Err(error)
            }
            (None, None) => Ok(state.key(&self.prefix, &task.saved.id())),
        };
        Some((task, ticket, go))
    }

    /// The next load, and whether it is to be done.
    pub(crate) fn next_load(&self) -> Option<(LoadTask, Done<Option<Loaded>>, Result<()>)> {
        let mut state = self.lock();
        let (task, done) = state.loads.pop_front()?;
        if !state.loads.is_empty() {
            self.for_loaders.notify_one();
        }
        state.loading += 1;
        let go = match &state.unreachable {
            _ if state.closing => Err(closed()),
            Some(reason) => {
                let error = Error::new(ErrorCode::Unreachable, reason.clone());
                state.status.load_failures += 1;
                Err(error)
            }
            None => Ok(()),
        };
        Some((task, done, go))
    }

    /// Tells the callback, then those who wait for all that was accepted.
    pub(crate) fn end_save(&self, task: SaveTask, ticket: Ticket, result: Result<bool>) {
        ticket.done.call(result);
        let (length, id) = (task.length, task.saved.id());
        drop(task); // its memory may be unmapped: not under the lock
        let mut state = self.lock();
        state.queue_bytes -= length;
        state.outstanding.remove(&ticket.number);
        if let Some(saving) = state.saving.get_mut(&id) {
            saving.count -= 1;
            if saving.count == 0 {
                state.saving.remove(&id);
            }
        }
        self.changed.notify_all();
    }

    pub(crate) fn end_load(&self, done: Done<Option<Loaded>>, result: Result<Option<Loaded>>) {
        self.lock().loading -= 1;
        done.call(result);
    }

    /// The object's key, as long as nobody clears.
    pub(crate) fn key(&self, id: &ObjectId) -> String {
        self.lock().key(&self.prefix, id)
    }

    /// Begins to get an object, by this key; `None`: it was removed.
    pub(crate) fn begin_get(&self, id: &ObjectId) -> Option<String> {
        let mut state = self.lock();
        if state.removed.contains_key(id) {
            return None;
        }
        state.getting.insert(*id, false);
        Some(state.key(&self.prefix, id))
    }

    /// Whether what was got may be used: it was not removed meanwhile, also where that has ended by now.
    pub(crate) fn end_get(&self, id: &ObjectId) -> bool {
        self.lock().getting.remove(id) == Some(false)
    }

    pub(crate) fn is_removed(&self, id: &ObjectId) -> bool {
        self.lock().removed.contains_key(id)
    }

    /// From now on the objects are not loaded, and saves that were accepted before do not bring them back.
    pub(crate) fn remove(&self, ids: &[ObjectId]) {
        let mut guard = self.lock();
        let state = &mut *guard;
        for id in ids {
            if let Some(saving) = state.saving.get_mut(id) {
                saving.overtaken = state.tickets;
            }
            state.begin_removal(id);
        }
        self.for_removers.notify_one();
    }

    /// From now on the object is not loaded until it is put anew.
    pub(crate) fn remove_damaged(&self, id: &ObjectId) {
        self.lock().begin_removal(id);
        self.for_removers.notify_one();
    }

    /// The next object that is to be taken out; `None`: there is none just now.
    pub(crate) fn next_removal(&self) -> Option<(ObjectId, u64)> {
        let mut state = self.lock();
        if state.removals_wait || !state.answers() {
            return None;
        }
        let (id, number) = loop {
            let Some((id, number)) = state.removals.pop_front() else {
                self.changed.notify_all(); // what was left was void
                return None;
            };
            if state.removed.get(&id) == Some(&number) {
                break (id, number);
            }
        };
        state.removing += 1;
        if !state.removals.is_empty() {
            self.for_removers.notify_one();
        }
        Some((id, number))
    }

    pub(crate) fn end_removal(&self, id: &ObjectId, number: u64, gone: bool) {
        let mut state = self.lock();
        state.removing -= 1;
        if !gone {
            state.removals_wait = true;
            state.removals.push_back((*id, number)); // behind others, which it must not hold up
        } else if state.removed.get(id) == Some(&number) {
            state.removed.remove(id);
        }
        self.changed.notify_all();
    }

    /// The remote has the object anew, or may have it. One that was removed meanwhile has to go again.
    pub(crate) fn was_put(&self, id: &ObjectId, ticket: u64, is_there: bool) {
        let mut state = self.lock();
        if state.is_overtaken(id, ticket) {
            state.begin_removal(id);
            self.for_removers.notify_one();
        } else if is_there {
            state.removed.remove(id);
        }
    }

    pub(crate) fn clear(&self) {
        let mut guard = self.lock();
        let state = &mut *guard;
        state.clears += 1;
        // Unlike any other server's: of a random number and a count.
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.server.to_le_bytes()).update(&state.clears.to_le_bytes());
        let epoch = hasher.finalize().to_hex();
        state.epoch = Some(epoch[..keys::EPOCH_DIGITS].to_owned());
        state.epoch_is_new = true;
        // A saver tells their callbacks: these take the store's lock, which whoever clears holds.
        state.overtaken.append(&mut state.saves);
        state.getting.values_mut().for_each(|removed| *removed = true);
        state.removed.clear(); // they are of the former epoch
        state.removals.clear();
        self.changed.notify_all();
        self.for_savers.notify_one();
        self.for_keeper.notify_one();
    }

    /// What the keeper has to do about the epoch: put this one, or see which there is. With the count of clears so far.
    pub(crate) fn epoch(&self) -> (Option<String>, bool, u64) {
        let state = self.lock();
        (state.epoch.clone(), state.epoch_is_new, state.clears)
    }

    /// The remote has this epoch, unless somebody here has cleared since.
    pub(crate) fn keep_epoch(&self, epoch: String, clears: u64) {
        let mut state = self.lock();
        if state.clears == clears {
            state.epoch = Some(epoch);
            state.epoch_is_new = false;
        }
    }

    /// A round of the keeper has ended: whether the remote answers, and if so, whether it takes objects.
    pub(crate) fn end_round(&self, begun: Instant, result: Result<Result<()>>) {
        let mut state = self.lock();
        let failed = state.unreachable.is_some() || state.unwritable.is_some();
        let first = state.rounds == 0;
        state.rounds += 1;
        state.probe = Some((begun.elapsed(), Instant::now()));
        // Behind large values a small one comes late: a remote that carries them has not failed for it.
        let works = state.succeeded.is_some_and(|at| at > begun);
        let is_late = |error: &Error| works && error.code == ErrorCode::Timeout;
        match result {
            Ok(writable) => {
                state.removals_wait = false;
                self.for_removers.notify_one();
                state.failures = 0;
                state.unreachable = None;
                match writable {
                    Ok(()) => state.unwritable = None,
                    Err(error) if is_late(&error) => {}
                    Err(error) => state.unwritable = Some(error.message),
                }
            }
            Err(error) if is_late(&error) => {}
            Err(error) => state.unreachable = Some(error.message),
        }
        let fails = state.unreachable.is_some() || state.unwritable.is_some();
        state.status.outages += u64::from(fails && (first || !failed));
        self.changed.notify_all();
    }

    pub(crate) fn took(&self, request: Request, took: Duration) {
        self.latencies[request as usize].observe(took);
    }

    pub(crate) fn succeeded(&self) {
        let mut state = self.lock();
        (state.failures, state.succeeded) = (0, Some(Instant::now()));
    }

    /// A request was not answered. `false`: there is no use in sending it again.
    pub(crate) fn failed(&self, error: &Error) -> bool {
        let mut state = self.lock();
        state.failures = state.failures.saturating_add(1);
        if state.failures >= FAILURES && state.unreachable.is_none() {
            state.unreachable = Some(error.message.clone());
            state.status.outages += 1;
            self.for_keeper.notify_one();
        }
        state.unreachable.is_none() && !state.closing
    }

    /// A save failed: none is accepted before the keeper has seen one succeed.
    pub(crate) fn save_failed(&self, error: &Error) {
        let mut state = self.lock();
        state.status.save_failures += 1;
        state.last_failure = Some(error.clone());
        if state.unwritable.is_none() {
            state.unwritable = Some(error.message.clone());
            state.status.outages += u64::from(state.unreachable.is_none());
            self.for_keeper.notify_one();
        }
    }

    pub(crate) fn flush(&self, deadline: Instant) -> Result<()> {
        let mut state = self.lock();
        let (last, failures) = (state.tickets, state.status.save_failures);
        let (mut saving, mut begun) = (true, 0);
        loop {
            if saving {
                saving = state.outstanding.first().is_some_and(|first| *first <= last);
                begun = state.removals_begun; // a save that was overtaken begins one before it ends
            }
            if !saving && !state.removes(begun) {
                break;
            }
            if Instant::now() >= deadline {
                let (saves, removals) = (state.outstanding.len(), state.removals.len());
                let message = format!(
                    "{saves} saves are not in the remote yet and {removals} removals not carried out; wait longer"
                );
                return Err(Error::new(ErrorCode::Timeout, message));
            }
            if state.workers == 0 {
                return Err(closed());
            }
            state = self.wait(state, deadline);
        }
        match &state.last_failure {
            Some(error) if state.status.save_failures > failures => Err(error.clone()),
            _ => Ok(()),
        }
    }

    pub(crate) fn status(&self) -> RemoteStatus {
        let latencies = REQUESTS.into_iter().zip(self.latencies.iter().map(Histogram::read));
        let state = self.lock();
        let failed = state.unreachable.as_ref().or(state.unwritable.as_ref());
        RemoteStatus {
            place: self.objects.place().to_owned(),
            queue_bytes: state.queue_bytes,
            queue_loads: state.loads.len() as u64 + state.loading,
            failed: failed.cloned(),
            probe: state.probe,
            latencies: latencies.collect(),
            ..state.status.clone()
        }
    }

    pub(crate) fn close(&self, deadline: Instant) -> Result<()> {
        let mut state = self.lock();
        state.closing = true;
        self.for_loaders.notify_waiters();
        self.for_loaders.notify_one(); // one that was about to wait; it wakes the next
        self.for_savers.notify_waiters();
        self.for_savers.notify_one();
        self.for_removers.notify_waiters();
        self.for_removers.notify_one();
        self.for_keeper.notify_one();
        while state.workers > 0 {
            if Instant::now() >= deadline {
                let message =
                    "the remote is still ending what is under way; close it again to wait";
                return Err(Error::new(ErrorCode::Timeout, message));
            }
            state = self.wait(state, deadline);
        }
        Ok(())
    }

    /// Counts a worker until it is dropped.
    pub(crate) fn present(self: &Arc<Self>) -> impl Drop + Send + use<> {
        Present(Arc::clone(self))
    }
}

struct Present(Arc<Shared>);

impl Drop for Present {
    fn drop(&mut self) {
        self.0.lock().workers -= 1;
        self.0.for_loaders.notify_one();
        self.0.for_savers.notify_one();
        self.0.for_removers.notify_one();
        self.0.changed.notify_all();
    }
}

impl State {
    fn key(&self, prefix: &str, id: &ObjectId) -> String {
        keys::object(prefix, self.epoch.as_deref().unwrap_or(keys::FIRST_EPOCH), id)
    }

    fn is_overtaken(&self, id: &ObjectId, ticket: u64) -> bool {
        self.saving.get(id).is_some_and(|saving| ticket <= saving.overtaken)
    }

    fn begin_removal(&mut self, id: &ObjectId) {
        if let Some(removed) = self.getting.get_mut(id) {
            *removed = true;
        }
        if !self.closing && self.removals.len() < REMOVED_MAX {
            self.removals_begun += 1;
            self.removed.insert(*id, self.removals_begun);
            self.removals.push_back((*id, self.removals_begun));
        }
    }

    /// Objects are being taken out, or will be at once, of the removals up to this one.
    fn removes(&self, last: u64) -> bool {
        let next = self.removals.front().is_some_and(|(_, number)| *number <= last);
        let waiting = next && !self.removals_wait && self.answers();
        waiting || self.removing > 0
    }

    fn answers(&self) -> bool {
        self.epoch.is_some() && self.unreachable.is_none() && !self.closing
    }
}

pub(crate) fn closed() -> Error {
    Error::new(ErrorCode::Closed, "the remote is closed; start the cache again")
}

pub(crate) fn random() -> Result<u64> {
    getrandom::u64()
        .map_err(|error| Error::new(ErrorCode::System, format!("no random numbers: {error}")))
}
