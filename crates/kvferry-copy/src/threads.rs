//! Copies side by side, on threads of our own.

use std::any::Any;
use std::cell::Cell;
use std::collections::VecDeque;
use std::num::NonZero;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread;

use kvferry_core::copy_plan::Direction;
use kvferry_core::{Error, ErrorCode, Result};

/// How many copy threads a process has: 1 to 64. Unset: the number of its processors, 4 at most, since more
/// of them than memory channels only wait for each other.
const VARIABLE: &str = "KVFERRY_COPY_THREADS";

/// Copies that wait in each direction at most; more are refused.
const JOBS_MAX: usize = 16 << 10;

/// Threads that copy. They are started by the first copy, and end some time after the value is dropped.
#[derive(Debug)]
pub struct CopyThreads(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    count: usize,
    queue: Mutex<Queue>,
    /// There is something to do, or the value was dropped.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    /// What engines wait for, the oldest first.
    loads: VecDeque<Arc<Job>>,
    /// What nobody waits for.
    stores: VecDeque<Arc<Job>>,
    started: usize,
    dropped: bool,
}

/// The parts of one copy. They are claimed in ascending order, by whoever has time.
pub(crate) trait Parts: Send + Sync {
    /// Copies a part.
    fn copy(&self, part: usize) -> Result<()>;

    /// A part was copied. It is not under way any more.
    fn copied(&self, part: usize);

    /// Nothing is under way any more, and nothing will be.
    fn ended(&self, result: Result<()>);
}

/// Parts that live until the job has ended.
enum Work {
    Owned(Box<dyn Parts>),
    /// What [`CopyThreads::run`] borrows.
    Borrowed(*const (dyn Fn(usize) -> Result<()> + Sync)),
}

// SAFETY: both kinds may be called by any thread; the borrowed one lives long enough, see `CopyThreads::run`.
unsafe impl Send for Work {}
// SAFETY: as above.
unsafe impl Sync for Work {}

/// A copy in parts.
pub(crate) struct Job {
    work: Work,
    parts: usize,
    /// Threads of the pool that may work on it at once.
    helpers: usize,
    state: Mutex<State>,
    end: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Parts that were claimed; all of them once it has failed.
    claimed: usize,
    running: usize,
    helping: usize,
    failed: Option<Error>,
    ended: bool,
}

/// Who claims a part.
#[derive(Debug, Clone, Copy, PartialEq)]
enum By {
    Caller,
    Helper,
}

enum Claim {
    Part(usize),
    /// As many threads as may help do so.
    Full,
    /// There is nothing to claim any more.
    Empty,
}

thread_local! {
    /// Whether this thread is one of a pool's, which never waits for them.
    static COPIES: Cell<bool> = const { Cell::new(false) };
}

impl CopyThreads {
    /// So many threads, at least one.
    pub fn new(count: usize) -> Self {
        let (queue, changed) = (Mutex::default(), Condvar::new());
        Self(Arc::new(Shared { count: count.max(1), queue, changed }))
    }

    /// Those of this process: as many as `KVFERRY_COPY_THREADS` says (1 to 64), or else as it has processors, 4 at
    /// most.
    ///
    /// # Errors
    /// The variable is none of these numbers.
    pub fn global() -> Result<&'static Arc<Self>> {
        static GLOBAL: LazyLock<Result<Arc<CopyThreads>>> = LazyLock::new(|| {
            let processors = thread::available_parallelism().map_or(1, NonZero::get);
            let variable = std::env::var_os(VARIABLE);
            let variable = variable.as_ref().map(|value| value.to_string_lossy());
            count_of(variable.as_deref(), processors).map(|count| Arc::new(CopyThreads::new(count)))
        });
        GLOBAL.as_ref().map_err(Clone::clone)
    }

    /// How many there are once they are started.
    pub fn count(&self) -> usize {
        self.0.count
    }

    /// How many are started.
    pub fn started(&self) -> usize {
        self.0.lock().started
    }

    /// Begins a copy in parts.
    ///
    /// # Errors
    /// The system has no thread for us; too many copies wait. Nothing was copied then.
    pub(crate) fn begin(
        &self,
        direction: Direction,
        parts: usize,
        work: Box<dyn Parts>,
    ) -> Result<Arc<Job>> {
        let job = Arc::new(Job::new(Work::Owned(work), parts, self.0.count));
        if parts == 0 {
            job.stop(Ok(()));
        } else {
            self.submit(direction, &job)?;
        }
        Ok(job)
    }

    /// Runs all parts and returns when none runs any more; what panics is an error. With `take_part` the calling
    /// thread is one of those that run them.
    pub(crate) fn run<'a>(
        &self,
        direction: Direction,
        parts: usize,
        take_part: bool,
        part: &'a (dyn Fn(usize) -> Result<()> + Sync + 'a),
    ) -> Result<()> {
        if parts <= 1 || self.0.count == 1 || COPIES.get() {
            return (0..parts).try_for_each(part);
        }
        let part: *const (dyn Fn(usize) -> Result<()> + Sync + 'a) = part;
        // SAFETY: only the lifetime changes. The job calls it only before it has ended, and this function returns,
        // without unwinding, only after that.
        let part = unsafe {
            std::mem::transmute::<
                *const (dyn Fn(usize) -> Result<()> + Sync + 'a),
                *const (dyn Fn(usize) -> Result<()> + Sync + 'static),
            >(part)
        };
        let helpers = self.0.count - usize::from(take_part);
        let job = Arc::new(Job::new(Work::Borrowed(part), parts, helpers));
        let alone = self.submit(direction, &job).is_err();
        if take_part || alone {
            while let Claim::Part(part) = job.claim(By::Caller) {
                job.run(part, By::Caller);
            }
        }
        job.wait()
    }

    fn submit(&self, direction: Direction, job: &Arc<Job>) -> Result<()> {
        let mut queue = self.0.lock();
        if queue.of(direction).len() >= JOBS_MAX {
            return Err(Error::new(
                ErrorCode::Timeout,
                format!("{JOBS_MAX} copies wait for the copy threads already"),
            ));
        }
        while queue.started < self.0.count {
            let (shared, number) = (Arc::clone(&self.0), queue.started);
            let builder = thread::Builder::new().name(format!("kvferry-copy-{number}"));
            match builder.spawn(move || shared.work()) {
                Ok(_) => queue.started += 1,
                Err(_) if number > 0 => break, // the others do it
                Err(error) => {
                    return Err(Error::system("cannot start a thread for copies", &error));
                }
            }
        }
        queue.of(direction).push_back(Arc::clone(job));
        drop(queue);
        self.0.changed.notify_all();
        Ok(())
    }
}

impl Drop for CopyThreads {
    fn drop(&mut self) {
        self.0.lock().dropped = true;
        self.0.changed.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a thread of the pool does.
    fn work(&self) {
        COPIES.set(true);
        let mut queue = self.lock();
        let mut over = Vec::new();
        loop {
            let claimed = queue.claim(&mut over);
            if claimed.is_some() || !over.is_empty() {
                drop(queue);
                over.clear();
                if let Some((job, part)) = claimed {
                    job.run(part, By::Helper);
                } // the last one of a job may free a pool, which takes its time
                queue = self.lock();
            } else if queue.dropped {
                queue.started -= 1;
                return;
            } else {
                queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

impl Queue {
    fn of(&mut self, direction: Direction) -> &mut VecDeque<Arc<Job>> {
        match direction {
            Direction::Scatter => &mut self.loads,
            Direction::Gather => &mut self.stores,
        }
    }

    /// A part of the oldest load that has one, or else of the oldest store. Jobs that have none go to `over`.
    fn claim(&mut self, over: &mut Vec<Arc<Job>>) -> Option<(Arc<Job>, usize)> {
        for direction in [Direction::Scatter, Direction::Gather] {
            let jobs = self.of(direction);
            let mut place = 0;
            while let Some(job) = jobs.get(place) {
                match job.claim(By::Helper) {
                    Claim::Part(part) => return Some((Arc::clone(job), part)),
                    Claim::Full => place += 1,
                    Claim::Empty => over.extend(jobs.remove(place)),
                }
            }
        }
        None
    }
}

impl Job {
    fn new(work: Work, parts: usize, helpers: usize) -> Self {
        Self { work, parts, helpers, state: Mutex::default(), end: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn claim(&self, by: By) -> Claim {
        let mut state = self.lock();
        if state.claimed == self.parts {
            return Claim::Empty;
        }
        if by == By::Helper {
            if state.helping == self.helpers {
                return Claim::Full;
            }
            state.helping += 1;
        }
        state.running += 1;
        state.claimed += 1;
        Claim::Part(state.claimed - 1)
    }

    /// Runs a part that was claimed.
    fn run(&self, part: usize, by: By) {
        let run = || match &self.work {
            Work::Owned(parts) => parts.copy(part),
            // SAFETY: the job has not ended, since a claimed part of it runs.
            Work::Borrowed(run) => unsafe { (**run)(part) },
        };
        let result = catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| Err(panicked()));
        let copied = result.is_ok();
        let ended = {
            let mut state = self.lock();
            state.running -= 1;
            state.helping -= usize::from(by == By::Helper);
            if let Err(error) = result {
                state.failed.get_or_insert(error);
                state.claimed = self.parts;
            }
            self.ended(&mut state)
        };
        if let (Work::Owned(parts), true) = (&self.work, copied) {
            tell(|| parts.copied(part));
        }
        self.tell_end(ended);
    }

    /// Lets no more of it begin; `reason` is its result if something was left.
    pub(crate) fn stop(&self, reason: Result<()>) {
        let ended = {
            let mut state = self.lock();
            if state.claimed < self.parts {
                state.claimed = self.parts;
                state.failed = state.failed.take().or(reason.err());
            }
            self.ended(&mut state)
        };
        self.tell_end(ended);
    }

    /// Waits until it has ended.
    pub(crate) fn wait(&self) -> Result<()> {
        let mut state = self.lock();
        while !state.ended {
            state = self.end.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.failed.clone().map_or(Ok(()), Err)
    }

    /// Its result, once.
    fn ended(&self, state: &mut State) -> Option<Result<()>> {
        let ended = state.running == 0 && state.claimed == self.parts && !state.ended;
        ended.then(|| {
            state.ended = true;
            state.failed.clone().map_or(Ok(()), Err)
        })
    }

    fn tell_end(&self, ended: Option<Result<()>>) {
        let Some(result) = ended else { return };
        self.end.notify_all();
        if let Work::Owned(parts) = &self.work {
            tell(|| parts.ended(result));
        }
    }
}

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Job").field("parts", &self.parts).finish_non_exhaustive()
    }
}

/// Calls who waits. A panic there is not ours, and must not end a thread of ours.
fn tell(wake: impl FnOnce()) {
    let _ = catch_unwind(AssertUnwindSafe(wake));
}

fn panicked() -> Error {
    Error::new(ErrorCode::Internal, "a copy panicked")
}

fn count_of(variable: Option<&str>, processors: usize) -> Result<usize> {
    let Some(variable) = variable else { return Ok(processors.clamp(1, 4)) };
    variable.parse().ok().filter(|count| (1..=64).contains(count)).ok_or_else(|| {
        Error::invalid(format!(
            "{VARIABLE} is {variable:?}: give 1 to 64 threads, or leave it unset"
        ))
    })
}

/// Runs `copies` to their end, on as many threads as help. Each should take a good part of a
/// millisecond. The first panic among them goes on here, when none of them runs any more.
pub fn run_copies(copies: Vec<Box<dyn FnOnce() + Send + '_>>) {
    let threads = CopyThreads::global().ok().filter(|threads| threads.count() > 1);
    let Some(threads) = threads.filter(|_| copies.len() > 1) else {
        return copies.into_iter().for_each(|copy| copy());
    };
    let copies: Vec<_> = copies.into_iter().map(|copy| Mutex::new(Some(copy))).collect();
    let panic: Mutex<Option<Box<dyn Any + Send>>> = Mutex::default();
    let run = |part: usize| {
        let copy = copies[part].lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(copy) = copy
            && let Err(payload) = catch_unwind(AssertUnwindSafe(copy))
        {
            panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(payload);
        }
        Ok(())
    };
    // The calling thread only waits: where it took part, the others often began a millisecond late.
    let ran = threads.run(Direction::Scatter, copies.len(), false, &run);
    debug_assert_eq!(ran, Ok(()), "no part fails");
    if let Some(payload) = panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
        resume_unwind(payload);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::sync::Weak;
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;

    type Log = Arc<Mutex<Vec<String>>>;

    /// Parts that write down what happens to them, and may wait for leave.
    struct Logged {
        name: &'static str,
        log: Log,
        /// Each part waits for one message.
        leave: Option<Mutex<Receiver<()>>>,
        fails_at: Option<usize>,
        ended: Sender<Result<()>>,
    }

    impl Logged {
        fn write(&self, what: impl std::fmt::Display) {
            self.log.lock().unwrap().push(format!("{} {what}", self.name));
        }
    }

    impl Parts for Logged {
        fn copy(&self, part: usize) -> Result<()> {
            if let Some(leave) = &self.leave {
                leave.lock().unwrap().recv().unwrap();
            }
            self.write(part);
            match self.fails_at {
                Some(at) if at == part => Err(Error::invalid("bad part")),
                _ => Ok(()),
            }
        }

        fn copied(&self, part: usize) {
            assert_ne!(part, 99, "nobody has so many");
        }

        fn ended(&self, result: Result<()>) {
            self.ended.send(result).unwrap();
        }
    }

    #[test]
    fn loads_overtake_stores_and_the_older_one_comes_first() {
        let threads = CopyThreads::new(1);
        let log = Log::default();
        let (leave, wait) = channel();
        let mut wait = Some(Mutex::new(wait));
        let ends: Vec<Receiver<Result<()>>> = [
            ("store", Direction::Gather, 3),
            ("later store", Direction::Gather, 1),
            ("load", Direction::Scatter, 2),
            ("later load", Direction::Scatter, 1),
        ]
        .into_iter()
        .map(|(name, direction, parts)| {
            let (ended, end) = channel();
            let leave = wait.take();
            let gated = leave.is_some();
            let work = Logged { name, log: Arc::clone(&log), leave, fails_at: None, ended };
            let job = threads.begin(direction, parts, Box::new(work)).unwrap();
            while gated && job.lock().claimed == 0 {
                thread::yield_now(); // the only thread is in the store's first part now
            }
            end
        })
        .collect();
        for _ in 0..3 {
            leave.send(()).unwrap();
        }
        for end in ends {
            assert_eq!(end.recv().unwrap(), Ok(()));
        }
        let expected =
            ["store 0", "load 0", "load 1", "later load 0", "store 1", "store 2", "later store 0"];
        assert_eq!(*log.lock().unwrap(), expected);
    }

    #[test]
    fn the_first_error_ends_a_copy_and_no_more_of_it_begins() {
        let threads = CopyThreads::new(1);
        let log = Log::default();
        let (ended, end) = channel();
        let work =
            Logged { name: "copy", log: Arc::clone(&log), leave: None, fails_at: Some(1), ended };
        let job = threads.begin(Direction::Gather, 4, Box::new(work)).unwrap();
        assert_eq!(end.recv().unwrap().unwrap_err().message, "bad part");
        assert_eq!(job.wait().unwrap_err().message, "bad part");
        job.stop(Err(Error::invalid("too late")));
        assert_eq!(job.wait().unwrap_err().message, "bad part");
        assert_eq!(*log.lock().unwrap(), ["copy 0", "copy 1"]);
        assert!(end.try_recv().is_err(), "it ends once");
    }

    #[test]
    fn what_is_stopped_ends_when_its_last_part_does() {
        let threads = CopyThreads::new(2);
        let (leave, wait) = channel();
        let (ended, end) = channel();
        let log = Log::default();
        let work = Logged {
            name: "copy",
            log: Arc::clone(&log),
            leave: Some(Mutex::new(wait)),
            fails_at: None,
            ended,
        };
        let job = threads.begin(Direction::Gather, 3, Box::new(work)).unwrap();
        while job.lock().claimed < 2 {
            thread::yield_now();
        }
        job.stop(Err(Error::new(ErrorCode::Closed, "stopped")));
        assert!(end.try_recv().is_err(), "two parts are under way");
        leave.send(()).unwrap();
        leave.send(()).unwrap();
        assert_eq!(job.wait().unwrap_err().code, ErrorCode::Closed);
        assert_eq!(end.recv().unwrap().unwrap_err().code, ErrorCode::Closed);
        assert_eq!(log.lock().unwrap().len(), 2, "the third never ran");
    }

    #[test]
    fn nothing_to_copy_has_ended_at_once() {
        let threads = CopyThreads::new(2);
        let (ended, end) = channel();
        let work = Logged { name: "", log: Log::default(), leave: None, fails_at: None, ended };
        threads.begin(Direction::Gather, 0, Box::new(work)).unwrap();
        assert_eq!(end.try_recv(), Ok(Ok(())));
        assert_eq!(threads.started(), 0, "and needs no thread");
    }

    #[test]
    fn threads_start_with_the_first_copy_survive_panics_and_end_with_their_owner() {
        let threads = CopyThreads::new(3);
        assert_eq!((threads.count(), threads.started()), (3, 0));
        for _ in 0..5 {
            let error = threads
                .run(Direction::Gather, 8, false, &|part| {
                    assert!(part != 5, "deliberate");
                    Ok(())
                })
                .unwrap_err();
            assert_eq!(error.code, ErrorCode::Internal);
        }
        let names: Mutex<HashSet<Option<String>>> = Mutex::default();
        let all = std::sync::Barrier::new(3); // each thread has one part
        let here = |_| {
            all.wait();
            names.lock().unwrap().insert(thread::current().name().map(str::to_owned));
            Ok(())
        };
        threads.run(Direction::Gather, 3, false, &here).unwrap();
        let expected = [0, 1, 2].map(|number| Some(format!("kvferry-copy-{number}")));
        assert_eq!(names.into_inner().unwrap(), HashSet::from(expected));
        assert_eq!(threads.started(), 3);
        let shared: Weak<Shared> = Arc::downgrade(&threads.0);
        drop(threads);
        while shared.strong_count() > 0 {
            thread::yield_now();
        }
    }

    #[test]
    fn borrowed_parts_run_once_each_and_the_caller_is_one_of_the_threads() {
        let threads = CopyThreads::new(2);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for parts in [0, 1, 2, 50] {
                        let runs: Vec<Mutex<usize>> = (0..parts).map(|_| Mutex::new(0)).collect();
                        let by_pool = Mutex::new(0);
                        let run = |part: usize| {
                            *runs[part].lock().unwrap() += 1;
                            if COPIES.get() {
                                let mut running = by_pool.lock().unwrap();
                                *running += 1;
                                assert!(*running <= 1, "the caller and one thread are two");
                                drop(running);
                                thread::yield_now();
                                *by_pool.lock().unwrap() -= 1;
                            }
                            Ok(())
                        };
                        threads.run(Direction::Scatter, parts, true, &run).unwrap();
                        assert!(runs.iter().all(|runs| *runs.lock().unwrap() == 1));
                    }
                });
            }
        });
    }

    #[test]
    fn a_copy_thread_that_runs_copies_does_not_wait_for_itself() {
        let threads = Arc::new(CopyThreads::new(2));
        let inner = Arc::clone(&threads);
        threads
            .run(Direction::Gather, 2, false, &|_| {
                inner.run(Direction::Gather, 4, false, &|_| Ok(()))
            })
            .unwrap();
    }

    #[test]
    fn every_copy_runs_once_however_many_there_are() {
        for count in [0, 1, 2, 3, 7, 100] {
            let mut runs = vec![0; count];
            run_copies(
                runs.iter_mut()
                    .map(|runs| Box::new(|| *runs += 1) as Box<dyn FnOnce() + Send>)
                    .collect(),
            );
            assert_eq!(runs, vec![1; count]);
        }
    }

    #[test]
    fn a_copy_that_panics_panics_in_the_caller_after_all_others_ran() {
        let ran = Mutex::new(0);
        let copies = (0..10)
            .map(|number| {
                let ran = &ran;
                let copy: Box<dyn FnOnce() + Send + '_> = Box::new(move || {
                    assert!(number != 3, "deliberate");
                    *ran.lock().unwrap() += 1;
                });
                copy
            })
            .collect();
        assert!(catch_unwind(AssertUnwindSafe(|| run_copies(copies))).is_err());
        if CopyThreads::global().unwrap().count() > 1 {
            assert_eq!(*ran.lock().unwrap(), 9);
        }
    }

    #[test]
    fn the_number_of_threads_is_said_or_follows_from_the_processors() {
        for (processors, count) in [(1, 1), (2, 2), (4, 4), (96, 4)] {
            assert_eq!(count_of(None, processors), Ok(count));
        }
        assert_eq!(count_of(Some("1"), 8), Ok(1));
        assert_eq!(count_of(Some("64"), 1), Ok(64));
        for bad in ["0", "65", "-1", "", "two", "1.5"] {
            let error = count_of(Some(bad), 8).unwrap_err();
            assert_eq!(error.code, ErrorCode::InvalidArgument);
            assert!(error.message.contains("KVFERRY_COPY_THREADS"), "{error}");
        }
    }
}
