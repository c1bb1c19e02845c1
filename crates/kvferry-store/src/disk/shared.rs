//! What the disk's threads share: the queues and the bookkeeping.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use kvferry_core::cache::Memory;
use kvferry_core::{Error, ErrorCode, Result};

use super::cleared;
use super::files::Files;
use super::format::{self, Named};
use super::health::{Health, Leave};
use super::index::{Index, Object, Victim};
use super::watched::{Running, Watched};
use super::{DiskOptions, DiskStatus, LoadDone, Loaded, Saved, SummedDone, Times};
use crate::index::ObjectId;
use crate::probe::is_probe;

/// Saves that may wait, however small.
const SAVES_MAX: usize = 65_536;
/// Loads that may wait. Their bytes have a bound already: each has a place in a pool.
const LOADS_MAX: usize = 65_536;
/// Files that are removed between two looks at the queues.
const REMOVALS: usize = 64;
/// How long a save waits for others to end where they have all the room.
const ROOM_WAIT: Duration = Duration::from_secs(10);
const ROOM_POLL: Duration = Duration::from_millis(50);

/// A callback that is called once: with an error if nothing else was said.
pub(crate) struct Done<T>(Option<Box<dyn FnOnce(Result<T>) + Send>>);

impl<T> Done<T> {
    pub(crate) fn new(done: Box<dyn FnOnce(Result<T>) + Send>) -> Self {
        Self(Some(done))
    }

    pub(crate) fn call(mut self, result: Result<T>) {
        self.say(result);
    }

    fn say(&mut self, result: Result<T>) {
        if let Some(done) = self.0.take() {
            // A callback that panics must not take the tier's thread with it.
            let _ = catch_unwind(AssertUnwindSafe(|| done(result)));
        }
    }
}

impl<T> Drop for Done<T> {
    fn drop(&mut self) {
        self.say(Err(Error::new(ErrorCode::Internal, "an operation of a tier was lost")));
    }
}

pub(crate) struct SaveTask {
    pub(crate) saved: Saved,
    pub(crate) memory: Arc<dyn Memory>,
    pub(crate) offset: u64,
    pub(crate) length: u64,
    /// What the bytes must have, where it is known.
    pub(crate) checksum: Option<u64>,
    /// There once it is accepted.
    pub(crate) done: Option<Done<bool>>,
    pub(crate) ticket: u64,
    /// It finds out whether the disk works again.
    pub(crate) trial: bool,
}

pub(crate) struct LoadTask {
    pub(crate) id: ObjectId,
    /// Pinned.
    pub(crate) object: Option<Object>,
    pub(crate) memory: Arc<dyn Memory>,
    pub(crate) offset: u64,
    pub(crate) length: u64,
    /// There once it is accepted.
    pub(crate) done: Option<Done<Option<Loaded>>>,
}

/// An object that is being written.
#[derive(Default)]
pub(crate) struct Writing {
    /// It was removed meanwhile.
    pub(crate) removed: bool,
    /// Saves of the same object: what becomes of it becomes of them.
    pub(crate) waiters: Vec<SaveTask>,
    /// Saves that came after the removal.
    pub(crate) successors: Vec<SaveTask>,
}

/// Under the lock.
#[derive(Default)]
pub(crate) struct State {
    pub(crate) index: Index,
    pub(crate) sequence: u64,
    pub(crate) loads: VecDeque<LoadTask>,
    pub(crate) loading: u64,
    pub(crate) saves: VecDeque<SaveTask>,
    /// Saves that were overtaken by a removal.
    pub(crate) overtaken: Vec<SaveTask>,
    pub(crate) writing: HashMap<ObjectId, Writing>,
    pub(crate) removals: VecDeque<Victim>,
    /// Threads that remove them.
    pub(crate) removing: usize,
    pub(crate) owed: Owed,
    pub(crate) cleared: Cleared,
    pub(crate) queue_bytes: u64,
    /// Bytes of files that are being written.
    pub(crate) reserved: u64,
    /// Bytes of files that are on their way out.
    pub(crate) leaving: u64,
    /// How often objects were removed by a caller.
    forgotten: u64,
    tickets: u64,
    /// Tickets of saves that were accepted and have not ended.
    outstanding: BTreeSet<u64>,
    pub(crate) last_failure: Option<Error>,
    pub(crate) health: Health,
    /// Its counters; the rest is filled in when asked for.
    pub(crate) status: DiskStatus,
    pub(crate) closing: bool,
    pub(crate) threads: usize,
    ids: Vec<ThreadId>,
}

impl State {
    /// Bytes of all files.
    pub(crate) fn bytes(&self) -> u64 {
        self.index.bytes() + self.reserved + self.leaving
    }

    /// Whether that very file is an object still.
    pub(crate) fn has(&self, object: &Object) -> bool {
        let Named { id, .. } = object.named;
        self.index.get(&id).is_some_and(|now| now.named == object.named)
    }

    fn is_idle_for_loads(&self) -> bool {
        self.loads.is_empty() && self.loading == 0
    }

    /// The callback of an accepted save was called.
    pub(crate) fn end(&mut self, ticket: u64, length: u64) {
        self.queue_bytes -= length;
        self.outstanding.remove(&ticket);
    }

    /// Nobody writes the object any more. Saves of it that came after a removal are next.
    pub(crate) fn end_writing(&mut self, id: &ObjectId) -> Writing {
        let mut writing = self.writing.remove(id).unwrap_or_default();
        for task in std::mem::take(&mut writing.successors).into_iter().rev() {
            self.saves.push_front(task);
        }
        writing
    }

    /// The turn of those that waited for an object comes again, unless it was removed meanwhile.
    pub(crate) fn save_again(&mut self, writing: Writing) {
        if writing.removed {
            self.overtaken.extend(writing.waiters);
        } else {
            writing.waiters.into_iter().rev().for_each(|task| self.saves.push_front(task));
        }
    }
}

/// Removals that failed: they are tried again after a pause, and a flush says so until they are done.
#[derive(Default)]
pub(crate) struct Owed {
    victims: Vec<Victim>,
    why: Option<Error>,
    /// Before they are tried again; longer after each time.
    pause: Duration,
    retry_at: Option<Instant>,
}

impl Owed {
    fn add(&mut self, victims: Vec<Victim>, why: Error, times: &Times) {
        self.victims.extend(victims);
        self.why = Some(why);
        self.pause = self.pause.max(times.retry);
        self.retry_at = Some(Instant::now() + self.pause);
    }

    /// When they are to be tried again, if there are any.
    pub(crate) fn retry_at(&self) -> Option<Instant> {
        self.retry_at
    }

    fn take(&mut self, times: &Times) -> Vec<Victim> {
        if self.retry_at.is_some() {
            self.pause = (2 * self.pause).min(times.retry_most);
        }
        (self.why, self.retry_at) = (None, None);
        std::mem::take(&mut self.victims)
    }

    /// Bytes of files that nobody removes just now.
    fn bytes(&self) -> u64 {
        self.victims.iter().map(Victim::bytes).sum()
    }
}

/// Up to which sequence number files were cleared. The disk says so before the first of them goes.
#[derive(Default)]
pub(crate) struct Cleared {
    wanted: u64,
    durable: u64,
    /// A thread writes it.
    writing: bool,
}

impl Cleared {
    /// As the disk says.
    pub(crate) fn new(durable: u64) -> Self {
        Self { wanted: durable, durable, writing: false }
    }

    /// Whether the disk does not say so yet.
    pub(crate) fn is_pending(&self) -> bool {
        self.wanted > self.durable
    }

    /// What is to be given to [`Shared::mark_cleared`].
    pub(crate) fn take(&mut self) -> Option<u64> {
        let is_due = self.is_pending() && !self.writing;
        self.writing |= is_due;
        is_due.then_some(self.wanted)
    }

    /// Where that failed, nothing but the files' removal is left to do.
    fn end(&mut self, sequence: u64, is_durable: bool) {
        self.writing = false;
        if is_durable {
            self.durable = sequence;
        } else if self.wanted == sequence {
            self.wanted = self.durable;
        }
    }
}

/// What was done to make room.
struct Eviction {
    /// What fails after this tick is not tried again.
    since: i64,
    /// [`State::forgotten`] when the last victims were taken out.
    forgotten: u64,
    /// Bytes.
    removed: u64,
    failure: Option<Error>,
}

impl Eviction {
    fn begin(index: &Index) -> Self {
        Self { since: index.tick(), forgotten: 0, removed: 0, failure: None }
    }
}

/// Why there is no room.
pub(crate) enum NoRoom {
    /// Nothing could be removed, or there is nothing to remove.
    Failed(Error),
    /// What could be removed was not enough: the disk works.
    Small(Error),
}

pub(crate) struct Shared {
    pub(crate) files: Arc<dyn Files>,
    running: Arc<Running>,
    pub(crate) bound: u64,
    pub(crate) times: Times,
    queue_bytes: u64,
    state: Mutex<State>,
    pub(crate) for_loaders: Condvar,
    pub(crate) for_savers: Condvar,
    /// Something ended.
    pub(crate) changed: Condvar,
}

impl Shared {
    pub(crate) fn new(
        options: &DiskOptions,
        files: Arc<dyn Files>,
        times: Times,
        state: State,
    ) -> Self {
        let running = Arc::<Running>::default();
        Self {
            files: Arc::new(Watched { files, running: Arc::clone(&running) }),
            running,
            bound: options.bytes,
            times,
            queue_bytes: options.queue_bytes,
            state: Mutex::new(state),
            for_loaders: Condvar::new(),
            for_savers: Condvar::new(),
            changed: Condvar::new(),
        }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn wait<'a>(
        &self,
        condition: &Condvar,
        state: MutexGuard<'a, State>,
        deadline: Option<Instant>,
    ) -> MutexGuard<'a, State> {
        match deadline {
            None => condition.wait(state).unwrap_or_else(PoisonError::into_inner),
            Some(deadline) => {
                let left = deadline.saturating_duration_since(Instant::now());
                condition.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
            }
        }
    }

    /// Whether whoever waited for a file now might wait for ever.
    pub(crate) fn hangs(&self) -> bool {
        self.running.longest().is_some_and(|(time, _)| time > self.times.hang)
    }

    /// Why it does.
    fn hang(&self) -> Option<String> {
        let (time, doing) = self.running.longest().filter(|(time, _)| *time > self.times.hang)?;
        Some(format!(
            "the disk tier hangs: the system has not answered for {} s, where it is to {doing} in {}; look at its log",
            time.as_secs(),
            self.files.directory().display()
        ))
    }

    /// What was being done to which file, and the system's reason.
    pub(crate) fn failure(&self, doing: &str, error: &io::Error) -> Error {
        let remedy = match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "free some space",
            io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied => {
                "make it writable"
            }
            io::ErrorKind::NotFound => "the directory is gone; it is made anew",
            _ => "look at the system's log",
        };
        let path = self.files.directory().display();
        Error::system(format!("the disk tier cannot {doing} in {path} ({remedy})"), error)
    }

    pub(crate) fn accept_save(&self, mut task: SaveTask, done: SummedDone) -> bool {
        let header = format::header_bytes(&task.saved).unwrap_or(format::HEADER_MAX) as u64;
        let bytes = format::padded(task.length).and_then(|bytes| bytes.checked_add(header));
        let counted = u64::from(!is_probe(&task.saved.id()));
        let mut state = self.lock();
        if state.closing {
            return false;
        }
        if bytes.is_none_or(|bytes| bytes > self.bound) {
            state.status.dropped_large += counted;
            return false;
        }
        // One that is larger than the queue waits alone: else it would never be on the disk.
        let full = state.queue_bytes > 0 && state.queue_bytes + task.length > self.queue_bytes;
        if full || state.saves.len() >= SAVES_MAX {
            state.status.dropped_full += counted;
            return false;
        }
        let leave = if self.hangs() { Leave::Refused } else { state.health.ask(Instant::now()) };
        match leave {
            Leave::Granted => {}
            Leave::Trial => task.trial = true,
            Leave::Refused => {
                state.status.dropped_failed += counted;
                return false;
            }
        }
        state.tickets += 1;
        task.ticket = state.tickets;
        task.done = Some(Done::new(done));
        state.outstanding.insert(task.ticket);
        state.queue_bytes += task.length;
        state.saves.push_back(task);
        self.for_savers.notify_one();
        true
    }

    pub(crate) fn accept_load(&self, mut task: LoadTask, done: LoadDone) -> bool {
        let mut state = self.lock();
        if state.closing || state.loads.len() >= LOADS_MAX || self.hangs() {
            state.status.refused_loads += u64::from(!state.closing);
            return false;
        }
        task.object = state.index.pin(&task.id);
        task.done = Some(Done::new(done));
        state.loads.push_back(task);
        self.for_loaders.notify_one();
        true
    }

    pub(crate) fn remove(&self, ids: &[ObjectId]) {
        if ids.is_empty() {
            return; // what waits to be saved is not looked through
        }
        let mut guard = self.lock();
        let state = &mut *guard;
        state.forgotten += 1;
        for id in ids {
            let object = state.index.remove(id).map(Victim::Object);
            let formers = state.index.remove_formers(id);
            object.into_iter().chain(formers).for_each(|victim| state.leave(victim));
            if let Some(writing) = state.writing.get_mut(id) {
                writing.removed = true;
                state.overtaken.append(&mut writing.successors);
            }
        }
        // The queue is looked through once, however many they are.
        let ids: HashSet<&ObjectId> = ids.iter().collect();
        let waiting = std::mem::take(&mut state.saves).into_iter();
        let (overtaken, kept): (VecDeque<_>, _) =
            waiting.partition(|task| ids.contains(&task.saved.id()));
        state.overtaken.extend(overtaken);
        state.saves = kept;
        self.for_savers.notify_all();
    }

    pub(crate) fn clear(&self) {
        let mut guard = self.lock();
        let state = &mut *guard;
        state.forgotten += 1;
        state.cleared.wanted = state.sequence;
        for victim in state.index.drain() {
            state.leave(victim);
        }
        for writing in state.writing.values_mut() {
            writing.removed = true;
            state.overtaken.append(&mut writing.successors);
        }
        state.overtaken.extend(std::mem::take(&mut state.saves));
        self.for_savers.notify_all();
    }

    pub(crate) fn flush(&self, deadline: Instant) -> Result<()> {
        let mut state = self.lock();
        if !state.closing {
            state.try_owed(&self.times);
            self.for_savers.notify_all();
        }
        let (last, failures) = (state.tickets, state.status.save_failures);
        while state.outstanding.first().is_some_and(|first| *first <= last)
            || !state.removals.is_empty()
            || state.removing > 0
            || state.cleared.is_pending()
        {
            if Instant::now() >= deadline {
                let waiting = state.outstanding.len();
                let message = format!("{waiting} saves are not on the disk yet; wait longer");
                return Err(Error::new(ErrorCode::Timeout, message));
            }
            if state.threads == 0 {
                return Err(closed());
            }
            state = self.wait(&self.changed, state, Some(deadline));
        }
        match (&state.owed.why, &state.last_failure) {
            (Some(error), _) => Err(error.clone()),
            (None, Some(error)) if state.status.save_failures > failures => Err(error.clone()),
            _ => Ok(()),
        }
    }

    pub(crate) fn status(&self) -> DiskStatus {
        let state = self.lock();
        DiskStatus {
            objects: state.index.objects(),
            bytes: state.bytes(),
            bound: self.bound,
            capacity: state.health.capacity(self.bound, Instant::now()),
            queue_bytes: state.queue_bytes,
            queue_saves: state.outstanding.len() as u64,
            queue_loads: state.loads.len() as u64 + state.loading,
            other_versions: state.index.others(),
            failed: self.hang().or_else(|| state.health.reason().map(str::to_owned)),
            ..state.status.clone()
        }
    }

    pub(crate) fn close(&self, deadline: Instant) -> Result<()> {
        let mut state = self.lock();
        if !state.closing {
            state.closing = true;
            state.try_owed(&self.times);
        }
        self.for_loaders.notify_all();
        self.for_savers.notify_all();
        self.changed.notify_all();
        while state.threads > 0 {
            let ours = state.ids.contains(&std::thread::current().id()); // it cannot wait for itself
            if ours || Instant::now() >= deadline {
                let message = "the disk is still ending what is under way; close it again to wait";
                return Err(Error::new(ErrorCode::Timeout, message));
            }
            state = self.wait(&self.changed, state, Some(deadline));
        }
        drop(state);
        self.files.release();
        Ok(())
    }

    /// Counts the calling thread until it is dropped.
    pub(crate) fn present(&self) -> impl Drop + '_ {
        self.lock().ids.push(std::thread::current().id());
        Present(self)
    }

    /// What a smaller bound leaves no room for goes at once, as far as it can be removed.
    pub(crate) fn shrink_to_bound(&self) {
        let mut eviction = Eviction::begin(&self.lock().index);
        loop {
            let mut state = self.lock();
            let over = state.bytes().saturating_sub(self.bound);
            let victims = state.take_victims(over, &mut eviction);
            drop(state);
            if victims.is_empty() {
                return;
            }
            self.evict(victims, &mut eviction);
        }
    }

    /// Reserves room for a file, for which what goes first is removed. `false`: what the calling thread has reserved
    /// already, `held`, has to become objects before.
    pub(crate) fn make_room(&self, bytes: u64, held: u64) -> Result<bool, NoRoom> {
        let give_up = Instant::now() + ROOM_WAIT;
        let mut eviction = Eviction::begin(&self.lock().index);
        loop {
            let now = Instant::now();
            let mut state = self.lock();
            let capacity = state.health.capacity(self.bound, now);
            let total = state.bytes() + bytes;
            if total <= capacity {
                state.reserved += bytes;
                return Ok(true);
            }
            let hopeless = eviction.failure.is_some() && now >= give_up;
            let wanted = if hopeless { 0 } else { total - capacity };
            let victims = state.take_victims(wanted, &mut eviction);
            if !victims.is_empty() {
                drop(state);
                self.evict(victims, &mut eviction);
                continue;
            }
            if let Some(sequence) = state.cleared.take() {
                drop(state);
                self.mark_cleared(sequence);
                continue;
            }
            let removals = state.take_removals(&self.times);
            if !removals.is_empty() {
                drop(state);
                self.unlink_removals(removals);
                continue;
            }
            if held > 0 {
                return Ok(false);
            }
            let leaving = state.leaving > state.owed.bytes();
            let others = state.reserved > 0 || leaving || !state.is_idle_for_loads();
            if !others || now >= give_up {
                let error = format!(
                    "the disk tier has room for {capacity} bytes in {} and cannot make {bytes} more; free some space",
                    self.files.directory().display()
                );
                return Err(match eviction.failure {
                    Some(error) if eviction.removed == 0 => NoRoom::Failed(error),
                    Some(error) => NoRoom::Small(error),
                    None => NoRoom::Failed(Error::new(ErrorCode::System, error)),
                });
            }
            drop(self.wait(&self.changed, state, Some(now + ROOM_POLL)));
        }
    }

    /// The file system has no room for a file of `bytes`, which are reserved: remembers that, and removes as much.
    /// `false`: there is nothing that can be removed.
    pub(crate) fn shrink(&self, bytes: u64) -> bool {
        let mut state = self.lock();
        let room = state.bytes().saturating_sub(bytes);
        state.health.shrink(room, Instant::now(), &self.times);
        let mut eviction = Eviction::begin(&state.index);
        drop(state);
        while eviction.removed < bytes {
            let victims = self.lock().take_victims(bytes - eviction.removed, &mut eviction);
            if victims.is_empty() {
                break;
            }
            self.evict(victims, &mut eviction);
        }
        eviction.removed > 0
    }

    /// Removes what is to make room. What cannot be removed stays what it is, unless a caller may have removed it
    /// meanwhile: then it must not come back.
    fn evict(&self, victims: Vec<Victim>, eviction: &mut Eviction) {
        for victim in victims {
            let removed = self.remove_file(&victim);
            let mut state = self.lock();
            state.leaving -= victim.bytes();
            match removed {
                Ok(()) => {
                    eviction.removed += victim.bytes();
                    state.status.evicted_objects += 1;
                    state.status.evicted_bytes += victim.bytes();
                    if let Victim::Object(object) = &victim {
                        state.status.evicted_ages.count(object.age(Instant::now()));
                    }
                }
                Err(error) => {
                    eviction.failure = Some(error);
                    if state.forgotten == eviction.forgotten {
                        state.index.put_back(victim);
                    } else {
                        state.leave(victim);
                        self.for_savers.notify_one();
                    }
                }
            }
            self.changed.notify_all();
        }
    }

    /// Removes a file, which need not be there.
    fn remove_file(&self, victim: &Victim) -> Result<()> {
        match self.files.remove(&victim.name()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(self.failure("remove a file", &error))
            }
            _ => Ok(()),
        }
    }

    /// Makes a clear outlive whatever comes, in one step.
    pub(crate) fn mark_cleared(&self, sequence: u64) {
        let written = cleared::write(&*self.files, sequence);
        self.lock().cleared.end(sequence, written.is_ok());
        self.for_savers.notify_all();
        self.changed.notify_all();
    }

    /// Removes what was removed from the index: for good, so that no restart finds it. What fails is owed.
    pub(crate) fn unlink_removals(&self, removals: Vec<Victim>) {
        let (mut removed, mut kept, mut why) = (Vec::new(), Vec::new(), None);
        for victim in removals {
            match self.remove_file(&victim) {
                Ok(()) => removed.push(victim),
                Err(error) => {
                    kept.push(victim);
                    why = Some(error);
                }
            }
        }
        if let Err(error) = self.files.sync() {
            why = Some(self.failure("sync", &error));
            // They take nothing any more, and a power loss may bring them back.
            kept.extend(removed.iter().map(|victim| Victim::Other(victim.name(), 0)));
        }
        let mut state = self.lock();
        state.removing -= 1;
        state.leaving -= removed.iter().map(Victim::bytes).sum::<u64>();
        match why {
            Some(error) => state.owed.add(kept, error, &self.times),
            None if state.owed.victims.is_empty() => state.owed.pause = Duration::ZERO,
            None => {}
        }
        self.changed.notify_all();
    }

    /// Lets loads go first.
    pub(crate) fn pause_for_loads(&self) {
        let mut state = self.lock();
        if state.is_idle_for_loads() {
            return;
        }
        let deadline = Instant::now() + self.times.pause;
        while !state.is_idle_for_loads() && !state.closing && Instant::now() < deadline {
            state = self.wait(&self.changed, state, Some(deadline));
        }
    }
}

impl State {
    /// The file is not an object any more, and will be removed.
    pub(crate) fn leave(&mut self, victim: Victim) {
        self.leaving += victim.bytes();
        self.removals.push_back(victim);
    }

    /// Takes out what goes first, `bytes` of it or all that may go.
    fn take_victims(&mut self, bytes: u64, eviction: &mut Eviction) -> Vec<Victim> {
        eviction.forgotten = self.forgotten;
        let mut victims = Vec::new();
        let mut taken = 0;
        while taken < bytes
            && let Some(victim) = self.index.evict(eviction.since)
        {
            taken += victim.bytes();
            victims.push(victim);
        }
        self.leaving += taken;
        victims
    }

    /// Some of what is to be removed; to be given to [`Shared::unlink_removals`] unless it is empty.
    pub(crate) fn take_removals(&mut self, times: &Times) -> Vec<Victim> {
        if self.cleared.is_pending() {
            return Vec::new();
        }
        let is_due = self.owed.retry_at.is_some_and(|at| Instant::now() >= at);
        if is_due && self.removals.is_empty() {
            self.try_owed(times);
        }
        let some = self.removals.len().min(REMOVALS);
        self.removing += usize::from(some > 0);
        self.removals.drain(..some).collect()
    }

    /// What is owed is to be removed now.
    fn try_owed(&mut self, times: &Times) {
        self.removals.extend(self.owed.take(times));
    }
}

pub(crate) fn closed() -> Error {
    Error::new(ErrorCode::Closed, "the disk is closed; open it again")
}

struct Present<'a>(&'a Shared);

impl Drop for Present<'_> {
    fn drop(&mut self) {
        self.0.lock().threads -= 1;
        self.0.changed.notify_all();
    }
}
