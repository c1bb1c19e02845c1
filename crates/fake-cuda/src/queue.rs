//! What streams have been asked to do, and the thread that does it.
//!
//! Guide, Asynchronous Concurrent Execution: control returns to the host before the device has completed the
//! task. Each operation runs once those before it in its stream, and those that the stream waits for, are done,
//! and a delay that the seed chooses has passed. Which of several streams is next depends on the delays; no
//! verdict does.

use crate::abi::Handle;
use crate::clocks::{Clock, Stamp};
use crate::copies::Piece;
use crate::events::{Elsewhere, Mark};
use crate::memory::Place;
use crate::state::{State, lock, within_host_function};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ffi::c_void;
use std::sync::{Condvar, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// 0 is done from the beginning.
pub(crate) type OpId = u64;

/// Between looks at what another process has to do first.
pub(crate) const ELSEWHERE: Duration = Duration::from_micros(100);

/// Told of every operation that is asked for or done.
pub(crate) static PROGRESS: Condvar = Condvar::new();

pub(crate) enum Work {
    /// A place in a stream, and the event that was recorded there.
    Mark(Option<Mark>),
    Copies(Vec<Piece>),
    Fill {
        to: Place,
        value: u8,
        bytes: u64,
    },
    /// The copies that a table on the device names.
    Kernel {
        table: Place,
        count: u64,
    },
    HostFunction {
        function: extern "C" fn(*mut c_void),
        data: u64,
    },
}

pub(crate) struct Op {
    pub(crate) id: OpId,
    pub(crate) work: Work,
    pub(crate) stamp: Stamp,
    pub(crate) clock: Clock,
    after: Vec<OpId>,
    elsewhere: Option<Elsewhere>,
    due: Instant,
}

/// A place in a stream's order, for an operation that is about to be asked for.
pub(crate) struct Turn {
    pub(crate) stream: Handle,
    pub(crate) stamp: Stamp,
    pub(crate) clock: Clock,
    pub(crate) after: Vec<OpId>,
    /// What another process has to come to first.
    pub(crate) elsewhere: Option<Elsewhere>,
}

pub(crate) struct Queue {
    streams: BTreeMap<Handle, VecDeque<Op>>,
    unfinished: BTreeSet<OpId>,
    last: OpId,
    random: u64,
    /// Nothing runs until it is let go.
    pub(crate) held: bool,
}

enum Next {
    Run(Handle),
    WaitUntil(Instant),
    Wait,
}

impl Queue {
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            streams: BTreeMap::new(),
            unfinished: BTreeSet::new(),
            last: 0,
            random: seed,
            held: false,
        }
    }

    pub(crate) fn seed(&mut self, seed: u64) {
        self.random = seed;
    }

    pub(crate) fn random(&mut self) -> u64 {
        next_random(&mut self.random)
    }

    pub(crate) fn is_done(&self, op: OpId) -> bool {
        !self.unfinished.contains(&op)
    }

    fn push(&mut self, turn: Turn, work: Work, delay: Duration) -> OpId {
        self.last += 1;
        let id = self.last;
        self.unfinished.insert(id);
        let Turn { stream, stamp, clock, after, elsewhere } = turn;
        let due = Instant::now() + delay;
        let op = Op { id, work, stamp, clock, after, elsewhere, due };
        self.streams.entry(stream).or_default().push_back(op);
        id
    }

    fn next(&self, now: Instant) -> Next {
        let mut next: Option<(Instant, Handle)> = None;
        for (&stream, ops) in &self.streams {
            let Some(op) = ops.front() else { continue };
            let free = op.after.iter().all(|&before| self.is_done(before));
            // Nobody tells of what happens in another process: it is looked for again and again.
            let waits = op.elsewhere.as_ref().is_some_and(|elsewhere| !elsewhere.is_done());
            let due = if waits { op.due.max(now + ELSEWHERE) } else { op.due };
            if free && !self.held && next.is_none_or(|(next, _)| due < next) {
                next = Some((due, stream));
            }
        }
        match next {
            Some((due, stream)) if due <= now => Next::Run(stream),
            Some((due, _)) => Next::WaitUntil(due),
            None => Next::Wait,
        }
    }

    /// Takes the first operation of a stream; until it is finished nothing else of the stream runs, as one
    /// thread runs everything.
    fn take(&mut self, stream: Handle) -> Option<Op> {
        self.streams.get_mut(&stream).and_then(VecDeque::pop_front)
    }

    fn finish(&mut self, op: OpId) {
        self.unfinished.remove(&op);
    }

    /// Drops what a stream still has to do, and counts its kernels.
    pub(crate) fn drop_stream(&mut self, stream: Handle) -> usize {
        let dropped = self.streams.remove(&stream).unwrap_or_default();
        for op in &dropped {
            self.unfinished.remove(&op.id);
        }
        dropped.iter().filter(|op| matches!(op.work, Work::Kernel { .. })).count()
    }
}

/// SplitMix64.
pub(crate) fn next_random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    mixed ^ (mixed >> 31)
}

impl State {
    /// Asks for `work` at its turn.
    pub(crate) fn enqueue(&mut self, turn: Turn, work: Work) -> OpId {
        let delay = match work {
            Work::Mark(_) => 0,
            _ => self.queue.random() % (self.config.delay_us + 1),
        };
        let stream = turn.stream;
        let op = self.queue.push(turn, work, Duration::from_micros(delay));
        if let Some(stream) = self.streams.get_mut(&stream) {
            stream.last = op;
        }
        PROGRESS.notify_all();
        op
    }
}

/// Starts the thread that runs what is asked for. It never ends: the process's end does not wait for it.
pub(crate) fn start() {
    let thread = std::thread::Builder::new().name("fake-cuda".into()).spawn(run);
    if let Err(error) = thread {
        eprintln!("[fake-cuda] no thread: {error}");
        std::process::abort();
    }
}

fn run() {
    let mut state = lock();
    loop {
        state = match state.queue.next(Instant::now()) {
            Next::Run(stream) => step(state, stream),
            Next::WaitUntil(due) => {
                let time = due.saturating_duration_since(Instant::now());
                PROGRESS.wait_timeout(state, time).unwrap_or_else(PoisonError::into_inner).0
            }
            Next::Wait => PROGRESS.wait(state).unwrap_or_else(PoisonError::into_inner),
        };
    }
}

fn step(mut state: MutexGuard<'static, State>, stream: Handle) -> MutexGuard<'static, State> {
    let Some(op) = state.queue.take(stream) else { return state };
    let id = op.id;
    if let Work::HostFunction { function, data } = op.work {
        drop(state); // it may take its time, but may call nothing here
        let data = std::ptr::with_exposed_provenance_mut(crate::abi::size_of(data));
        within_host_function(op.stamp, op.clock, || function(data));
        state = lock();
    } else {
        state.execute(stream, op);
    }
    state.queue.finish(id);
    PROGRESS.notify_all();
    state
}
