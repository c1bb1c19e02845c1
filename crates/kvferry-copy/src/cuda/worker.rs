//! The thread that asks a device for copies and sees when they are done. It never waits for one of them: what
//! is asked for is looked at in turns, loads before stores.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use kvferry_core::cache::{Memory, Permit};
use kvferry_core::copy_plan::{CopyShape, Direction, Piece};
use kvferry_core::{Error, ErrorCode, Result};

use super::ahead::Ahead;
use super::context::{Context, Current};
use super::driver::{Failed, Handle};
use super::pins::PinUse;
use super::submit::{Kernel, Pieces, Submission, Table};
use super::{DOUBT_MAX, IpcArray, Job, Shared, closed, not_closed, unreachable_pool};
use crate::{POOL_STEP, pins_of, place_of};

/// Bytes of a part, which has an event of its own: about 0.2 ms, so that layers are told of early, and a pool's
/// [`Permit`] is not held for long.
const PART_BYTES: u64 = 4 << 20;
/// Pieces of a part at most, for the same reasons.
const PART_PIECES: usize = 4096;
/// Parts of a direction that are under way at most: enough for the copy engine never to wait for us.
const PARTS: usize = 4;
/// Looks without news before the thread sleeps between them, and how long it sleeps then.
const EAGER: u32 = 64;
const PAUSE_MIN: Duration = Duration::from_micros(10);
const PAUSE_MAX: Duration = Duration::from_micros(320);

/// Turns the kernel for small pieces off.
const KERNEL_VARIABLE: &str = "KVFERRY_CUDA_KERNEL";

/// Arrays by address and bytes, or in another process's memory.
pub(super) enum Arrays {
    Ours(Vec<(u64, u64)>),
    Ipc(Vec<IpcArray>),
}

pub(super) struct SetUp {
    pub(super) shared: Arc<Shared>,
    pub(super) shape: Arc<CopyShape>,
    pub(super) device: u32,
    pub(super) stream: Handle,
    pub(super) arrays: Arrays,
}

/// What is made at the beginning and given back at the end.
#[derive(Default)]
struct Made {
    opened: Vec<([u8; 64], u64)>,
    streams: Vec<Handle>,
}

/// The thread's whole life. `ready` hears how the beginning went.
pub(super) fn run(set_up: &SetUp, ready: &SyncSender<Result<()>>) {
    let shared = Arc::clone(&set_up.shared);
    let begun = Context::retain(set_up.device).and_then(|context| {
        let current = context.enter()?;
        let mut made = Made::default();
        let worker = made.begin(set_up, &context, &current);
        let worker = worker.map(|mut worker| {
            let _ = ready.send(Ok(()));
            if catch_unwind(AssertUnwindSafe(|| worker.run())).is_err() {
                shared.lock().failed =
                    Some(Error::new(ErrorCode::Internal, "the thread for CUDA panicked"));
                worker.settle(); // before anything is given back
            }
            worker.end()
        });
        if !matches!(worker, Ok(End::InDoubt)) {
            made.release(&shared, &current);
        }
        worker
    });
    let mut state = shared.lock();
    state.context = None;
    state.ended = true;
    let jobs = std::mem::take(&mut state.jobs);
    drop(state);
    drop(jobs); // none, unless the thread panicked
    shared.ended.notify_all();
    if let Err(error) = begun {
        let _ = ready.send(Err(error));
    }
}

impl Made {
    fn begin<'a>(
        &mut self,
        set_up: &SetUp,
        context: &'a Arc<Context>,
        current: &'a Current<'a>,
    ) -> Result<Worker<'a>> {
        let arrays = match &set_up.arrays {
            Arrays::Ours(arrays) => arrays.clone(),
            Arrays::Ipc(arrays) => {
                let arrays: Result<Vec<_>> =
                    arrays.iter().map(|array| self.open(current, array)).collect();
                let arrays = arrays?;
                set_up.shape.check_arrays(&arrays)?;
                arrays
            }
        };
        for (address, bytes) in &arrays {
            current.check_memory(*address, *bytes)?;
        }
        let mut lane = |direction| -> Result<Lane> {
            let stream = current.new_stream()?;
            self.streams.push(stream);
            let (jobs, parts) = Default::default();
            Ok(Lane { direction, stream, jobs, parts, doubted: None })
        };
        let lanes = [lane(Direction::Scatter)?, lane(Direction::Gather)?];
        let off = std::env::var_os(KERNEL_VARIABLE).is_some_and(|value| value == "0");
        // A driver that does not take it still copies, more slowly.
        let kernel = if off { None } else { Kernel::load(current).ok() };
        let mut state = set_up.shared.lock();
        state.context = Some(Arc::clone(context));
        state.kernel = kernel;
        drop(state);
        Ok(Worker {
            shared: Arc::clone(&set_up.shared),
            context,
            current,
            stream: set_up.stream,
            arrays: arrays.into_iter().map(|(address, _)| address).collect(),
            lanes,
            pools: Vec::new(),
            pieces: Pieces::default(),
            tables: Vec::new(),
            ids: 0,
            doubtful: false,
        })
    }

    /// Where an exported array is in this process.
    fn open(&mut self, current: &Current<'_>, array: &IpcArray) -> Result<(u64, u64)> {
        let known = self.opened.iter().find(|(handle, _)| *handle == array.handle);
        let start = match known {
            Some((_, start)) => *start,
            None => {
                let start = current.open_ipc(&array.handle)?;
                self.opened.push((array.handle, start));
                start
            }
        };
        let (from, length) = current.allocation(start).unwrap_or((start, u64::MAX - start));
        let end = array.offset.checked_add(array.bytes);
        if end.is_none_or(|end| end > length - (start - from)) {
            return Err(Error::invalid(format!(
                "{} bytes at {} lie beyond the exported memory's {length} bytes",
                array.bytes, array.offset
            )));
        }
        Ok((start + array.offset, array.bytes))
    }

    fn release(self, shared: &Shared, current: &Current<'_>) {
        for stream in self.streams {
            current.destroy_stream(stream);
        }
        let mut state = shared.lock();
        state.events.all.drain(..).for_each(|event| current.destroy_event(event));
        state.events.free.clear();
        if let Some(kernel) = state.kernel.take() {
            kernel.unload(current);
        }
        drop(state);
        for (_, start) in self.opened {
            current.close_ipc(start);
        }
    }
}

/// What is known at the end.
enum End {
    /// Nothing is under way.
    Settled,
    /// Something may be, for ever: nothing that it needs is given back.
    InDoubt,
}

struct Worker<'a> {
    shared: Arc<Shared>,
    context: &'a Arc<Context>,
    current: &'a Current<'a>,
    /// The engine's.
    stream: Handle,
    arrays: Vec<u64>,
    /// Loads, stores.
    lanes: [Lane; 2],
    pools: Vec<Joined>,
    pieces: Pieces,
    tables: Vec<Table>,
    ids: u64,
    /// Copies may be under way that nothing will tell the end of.
    doubtful: bool,
}

/// A pool that copies were asked for of.
struct Joined {
    pins: PinUse,
    ahead: Ahead,
}

/// One direction.
struct Lane {
    direction: Direction,
    stream: Handle,
    jobs: VecDeque<Running>,
    parts: VecDeque<Part>,
    /// Since when the driver does not say whether the first part is done.
    doubted: Option<Instant>,
}

struct Running {
    id: u64,
    job: Job,
    /// What is asked for comes after the engine's compute.
    ordered: bool,
    /// Bytes of the plan that were asked for.
    at: u64,
    /// Parts under way.
    parts: usize,
    failed: Option<Error>,
    /// Parts may be under way though it ends.
    in_doubt: bool,
}

/// Copies that were asked for together.
struct Part {
    job: u64,
    /// Bytes of the plan that are done with it.
    until: u64,
    /// `None`: a call failed, and the event is still to be recorded. Nothing else says whether some of the copies
    /// were begun, and when they are over.
    event: Option<Handle>,
    table: Option<Table>,
    permit: Option<Permit>,
}

impl Running {
    fn is_asked_for(&self) -> bool {
        self.failed.is_some() || self.at == self.job.plan.bytes()
    }
}

impl Worker<'_> {
    fn run(&mut self) {
        let mut looks = 0;
        while self.take(looks) {
            let mut news = false;
            for lane in [0, 1] {
                news |= self.poll(lane);
            }
            for lane in [0, 1] {
                news |= self.ask(lane);
            }
            looks = if news { 0 } else { looks + 1 };
        }
    }

    /// Waits for what is under way, of which nothing is known any more.
    fn settle(&self) {
        for lane in &self.lanes {
            let _ = self.current.synchronize(lane.stream);
        }
    }

    /// Gives back what is no stream's; nothing is under way, unless that is in doubt.
    fn end(mut self) -> End {
        self.pools.iter().for_each(|pool| pool.ahead.stop());
        self.pools.iter_mut().for_each(|pool| pool.ahead.wait());
        if self.doubtful {
            std::mem::forget((self.pools, self.tables));
            return End::InDoubt;
        }
        self.tables.drain(..).for_each(|table| table.free(self.current));
        self.pools.clear(); // while the context is current
        End::Settled
    }

    /// Takes new jobs, after a pause where there was nothing new `looks` times; `false` when all is done.
    fn take(&mut self, looks: u32) -> bool {
        let shared = Arc::clone(&self.shared);
        let mut state = shared.lock();
        while state.jobs.is_empty() && self.lanes.iter().all(|lane| lane.jobs.is_empty()) {
            if state.closed {
                return false;
            }
            state = shared.jobs.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.jobs.is_empty() && looks > EAGER {
            let longer = (looks - EAGER).min(16);
            let pause = PAUSE_MAX.min(PAUSE_MIN * 2u32.pow(longer / 2));
            let waited = shared.jobs.wait_timeout(state, pause);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        let jobs = std::mem::take(&mut state.jobs);
        let (failed, closed_at) = (state.failed.clone(), state.closed_at);
        drop(state);
        if looks > 0 && looks <= EAGER {
            thread::yield_now();
        }
        for job in jobs {
            self.ids += 1;
            let lane = usize::from(job.plan.direction() == Direction::Gather);
            let (ordered, at, parts, failed, in_doubt) = (false, 0, 0, None, false);
            let running = Running { id: self.ids, job, ordered, at, parts, failed, in_doubt };
            self.lanes[lane].jobs.push_back(running);
        }
        if let Some(error) = failed {
            self.lose(&error, true); // no part of theirs was asked for
        }
        if let Some(since) = closed_at {
            self.close(since);
        }
        true
    }

    /// Ends what the device was not asked for. It may never come to its compute, and then not to the rest either.
    fn close(&mut self, since: Instant) {
        for lane in [0, 1] {
            let waits = |running: &Running| !running.ordered && running.parts == 0;
            while let Some(index) = self.lanes[lane].jobs.iter().position(waits) {
                self.lanes[lane].jobs[index].failed.get_or_insert_with(closed);
                self.finish(lane, index);
            }
        }
        if since.elapsed() > DOUBT_MAX {
            self.lose(&not_closed(), false);
        }
    }

    /// Looks whether parts are done.
    fn poll(&mut self, lane: usize) -> bool {
        let mut news = false;
        loop {
            let looked = self.look(lane);
            let Lane { parts, jobs, doubted, .. } = &mut self.lanes[lane];
            match looked {
                Ok(false) => {
                    *doubted = None;
                    return news;
                }
                Ok(true) => {
                    *doubted = None;
                    if let Some(part) = parts.pop_front() {
                        self.complete(lane, part);
                    }
                    news = true;
                }
                // Whatever the reason: the copies may be under way, so all that they need stays.
                Err(Failed { error, what, lost }) => {
                    let since = *doubted.get_or_insert_with(Instant::now);
                    let job = parts.front().map(|part| part.job);
                    if let Some(running) = jobs.iter_mut().find(|running| Some(running.id) == job) {
                        running.failed.get_or_insert_with(|| error.clone());
                    }
                    if lost || since.elapsed() > DOUBT_MAX {
                        let error = if lost { error } else { unanswered(&what) };
                        self.shared.lock().failed.get_or_insert_with(|| error.clone());
                        self.lose(&error, lost);
                    }
                    return news;
                }
            }
        }
    }

    /// Whether the first part is done.
    fn look(&mut self, lane: usize) -> Result<bool, Failed> {
        let Lane { stream, parts, .. } = &mut self.lanes[lane];
        let Some(part) = parts.front_mut() else { return Ok(false) };
        let event = match part.event {
            Some(event) => event,
            None => {
                let event = self.shared.lock().events.record(self.current, *stream)?;
                *part.event.insert(event)
            }
        };
        self.current.is_done(event)
    }

    /// Asks for the next part.
    fn ask(&mut self, lane: usize) -> bool {
        let Lane { jobs, parts, .. } = &self.lanes[lane];
        if parts.len() >= PARTS {
            return false;
        }
        let Some(index) = jobs.iter().position(|running| !running.is_asked_for()) else {
            return false;
        };
        let id = jobs[index].id;
        match self.order(lane, index) {
            Ok(true) => {}
            Ok(false) => return false,
            Err(error) => {
                self.fail(lane, id, error);
                return true;
            }
        }
        if let Err(error) = self.ask_part(lane, index) {
            self.fail(lane, id, error);
        }
        true
    }

    /// Puts a job's copies after the engine's compute; `false` while they must wait for it here.
    fn order(&mut self, lane: usize, index: usize) -> Result<bool> {
        let Lane { direction, stream, jobs, .. } = &mut self.lanes[lane];
        let running = &mut jobs[index];
        if !running.ordered {
            match direction {
                // The stream waits. Loads need no permit.
                Direction::Scatter => self.current.wait(*stream, running.job.compute)?,
                // We wait: while a stream did, the pool's permit would be held, for as long as the compute takes.
                Direction::Gather if !self.current.is_done(running.job.compute)? => {
                    return Ok(false);
                }
                Direction::Gather => {}
            }
            running.ordered = true;
        }
        Ok(true)
    }

    fn ask_part(&mut self, lane: usize, index: usize) -> Result<()> {
        let pool = self.join(lane, index)?;
        let Lane { direction, stream, jobs, parts, .. } = &mut self.lanes[lane];
        let (direction, running) = (*direction, &mut jobs[index]);
        let joined = &mut self.pools[pool];
        let is_first = running.at == 0;
        collect(
            running,
            &self.arrays,
            &joined.pins,
            (self.current, self.context),
            &mut self.pieces,
        )?;
        let permit = match direction {
            // After memory was page-locked, which takes its time.
            Direction::Gather => Some(running.job.pool.permit()?),
            Direction::Scatter => None,
        };
        let state = self.shared.lock();
        let (method, kernel) = (state.method, state.kernel);
        drop(state);
        let current = self.current;
        let submission = Submission { current, stream: *stream, direction, method, kernel };
        let (table, submitted) = submission.submit(&self.pieces, &mut self.tables);
        let recorded = submitted.and_then(|()| {
            running.at += self.pieces.total();
            Ok(self.shared.lock().events.record(current, *stream)?)
        });
        running.parts += 1;
        let (job, until, event) = (running.id, running.at, recorded.as_ref().ok().copied());
        parts.push_back(Part { job, until, event, table, permit });
        if is_first {
            // Not before: this part's own steps come first.
            joined.ahead.go_on(&joined.pins, self.context, &running.job.pool);
        }
        let event = recorded?;
        // What the engine asks for from now on comes after the load. Not earlier: layers that are there could not
        // be used while others are loaded.
        if direction == Direction::Scatter && running.is_asked_for() {
            current.wait(self.stream, event)?;
        }
        Ok(())
    }

    /// A job's pool's place in the list.
    fn join(&mut self, lane: usize, index: usize) -> Result<usize> {
        let pool = &self.lanes[lane].jobs[index].job.pool;
        let pins = pins_of(&**pool).ok_or_else(unreachable_pool)?;
        if let Some(known) = self.pools.iter().position(|known| known.pins.is_of(pins)) {
            return Ok(known);
        }
        let joined = Joined { pins: pins.join(), ahead: Ahead::new(&self.shared) };
        self.pools.retain(|known| !known.pins.is_over());
        self.pools.push(joined);
        Ok(self.pools.len() - 1)
    }

    /// Ends a part, which is done.
    fn complete(&mut self, lane: usize, part: Part) {
        let Part { job, until, event, table, permit } = part;
        drop(permit);
        self.tables.extend(table);
        self.shared.lock().events.free.extend(event);
        let jobs = &mut self.lanes[lane].jobs;
        let Some(index) = jobs.iter().position(|running| running.id == job) else { return };
        let running = &mut jobs[index];
        running.parts -= 1;
        let arrays = until / running.job.plan.bytes_per_array();
        running.job.progress.arrays(usize::try_from(arrays).unwrap_or(usize::MAX));
        if running.parts == 0 && running.is_asked_for() {
            self.finish(lane, index);
        }
    }

    fn finish(&mut self, lane: usize, index: usize) {
        let Some(running) = self.lanes[lane].jobs.remove(index) else { return };
        let Job { pool, progress, compute, .. } = running.job;
        let mut state = self.shared.lock();
        state.events.free.push(compute);
        let ended = Arc::downgrade(&progress);
        state.unfinished.retain(|known| !known.ptr_eq(&ended));
        drop(state);
        drop(pool);
        match running.failed {
            Some(error) if running.in_doubt => progress.end_in_doubt(error),
            failed => progress.end(failed.map_or(Ok(()), Err)),
        }
    }

    /// Lets no more of a job begin, and ends it with an error once nothing of it is under way.
    fn fail(&mut self, lane: usize, job: u64, error: Error) {
        let jobs = &mut self.lanes[lane].jobs;
        let Some(index) = jobs.iter().position(|running| running.id == job) else { return };
        jobs[index].failed.get_or_insert(error);
        if jobs[index].parts == 0 {
            self.finish(lane, index);
        }
    }

    /// Ends all jobs: the device does not answer any more. What may still be written by it, as it is not `lost` for
    /// sure, is kept for ever: pools stay mapped, and slots with whoever may write to them.
    fn lose(&mut self, error: &Error, lost: bool) {
        let is_under_way = self.lanes.iter().any(|lane| !lane.parts.is_empty());
        if !lost && is_under_way {
            self.doubtful = true;
            self.shared.lock().doubt.get_or_insert_with(|| error.clone());
        }
        // What the engine computes in blocks that it takes for failed comes after a load that goes on.
        let loads = self.lanes[0].parts.iter().rev().find_map(|part| part.event);
        if let Some(event) = loads.filter(|_| !lost) {
            let _ = self.current.wait(self.stream, event);
        }
        for lane in [0, 1] {
            for running in &mut self.lanes[lane].jobs {
                running.failed.get_or_insert_with(|| error.clone());
                running.in_doubt = !lost && running.parts > 0;
                if running.in_doubt {
                    running.failed = Some(error.clone()); // it says more than the call that failed
                    std::mem::forget(Arc::clone(&running.job.pool));
                }
            }
            for part in std::mem::take(&mut self.lanes[lane].parts) {
                if lost {
                    self.tables.extend(part.table);
                } else {
                    std::mem::forget((part.table, part.permit));
                }
            }
            while !self.lanes[lane].jobs.is_empty() {
                self.finish(lane, 0);
            }
        }
    }
}

/// The doubt of copies that a call never told the end of.
fn unanswered(what: &str) -> Error {
    let message = format!(
        "the GPU has not told for {} s whether its copies are over ({what}): no later copy of this KV memory is tried, and \
         what these may yet write to stays set apart; shut the adapter down, and start the process anew if the GPU does \
         not answer",
        DOUBT_MAX.as_secs()
    );
    Error::new(ErrorCode::CudaFailed, message)
}

/// Collects the pieces of a job's next part, cut where one registration ends and the next begins.
fn collect(
    running: &Running,
    arrays: &[u64],
    pins: &PinUse,
    (current, context): (&Current<'_>, &Arc<Context>),
    pieces: &mut Pieces,
) -> Result<()> {
    let (plan, pool) = (&running.job.plan, &*running.job.pool);
    let (limit, of_array) = (running.at + PART_BYTES, plan.bytes_per_array());
    let whole_arrays = limit / of_array * of_array;
    let end = if whole_arrays > running.at { whole_arrays } else { limit };
    pieces.clear();
    let mut step: Option<Step> = None;
    let mut is_full = false;
    let collected = plan.pieces(running.at..end, |piece| {
        let Piece { array, mut at, pool: mut offset, mut length } = piece;
        while length > 0 {
            if pieces.len() == PART_PIECES {
                is_full = true;
                return Err(Error::new(ErrorCode::Internal, "enough pieces for one part"));
            }
            let step = match &mut step {
                Some(step) if step.number == offset / POOL_STEP => step,
                other => other.insert(Step::find(pool, pins, (current, context), offset)?),
            };
            let within = offset % POOL_STEP;
            let bytes = length.min(step.bytes - within);
            pieces.push(
                step.host + within,
                step.mapped + within,
                arrays[array] + at,
                usize::try_from(bytes).unwrap_or(usize::MAX),
            );
            at += bytes;
            offset += bytes;
            length -= bytes;
        }
        Ok(())
    });
    if is_full { Ok(()) } else { collected }
}

/// A registered step of a pool.
pub(super) struct Step {
    number: u64,
    bytes: u64,
    host: u64,
    mapped: u64,
}

impl Step {
    /// The step that `offset` lies in, which is mapped and registered now if it was not yet.
    pub(super) fn find(
        pool: &dyn Memory,
        pins: &PinUse,
        (current, context): (&Current<'_>, &Arc<Context>),
        offset: u64,
    ) -> Result<Self> {
        let number = offset / POOL_STEP;
        let start = number * POOL_STEP;
        let bytes = POOL_STEP.min(pool.bytes().saturating_sub(start));
        let length = usize::try_from(bytes).unwrap_or(usize::MAX);
        let host = place_of(pool, start, length)?.ok_or_else(unreachable_pool)?;
        let mapped = pins.step(current, context, number, (host, length))?;
        Ok(Self { number, bytes, host: host.expose_provenance() as u64, mapped })
    }
}
