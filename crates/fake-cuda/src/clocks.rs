//! Races by vector clocks over streams, events and the host.
//!
//! Guide, Streams: "a sequence of commands that execute in order. Different streams, on the other hand, may
//! execute their commands out of order with respect to one another or concurrently"; order between them, and
//! towards the host, exists only where the program makes it: by an event that is waited for, by the legacy
//! default stream, by a synchronising call, by a query that answered with success. Two accesses to the same bytes, one of them
//! a write, with no such order between them, are a race, whether or not it did harm this time.
//!
//! Our reading: all threads of the host are one actor, whose order is the order of its calls; how they agree among
//! themselves is not seen here.

use crate::abi::{bytes_of, range};
use crate::state::{State, host_function_stream, lock};
use std::collections::BTreeMap;

/// A stream's handle, the early reader of a stream, or `HOST`.
pub(crate) type Actor = u64;
pub(crate) const HOST: Actor = 0;

/// The actor that reads a stream's sources out of stream order. Handles are even.
pub(crate) fn early_reader(stream: u64) -> Actor {
    stream | 1
}

/// One step of an actor.
#[derive(Clone, Copy)]
pub(crate) struct Stamp {
    actor: Actor,
    tick: u64,
}

/// What is known to have happened: for each actor, its last step.
#[derive(Clone, Default)]
pub(crate) struct Clock(BTreeMap<Actor, u64>);

impl Clock {
    pub(crate) fn join(&mut self, other: &Self) {
        for (&actor, &tick) in &other.0 {
            let mine = self.0.entry(actor).or_default();
            *mine = tick.max(*mine);
        }
    }

    pub(crate) fn tick(&mut self, actor: Actor) -> Stamp {
        let tick = self.0.entry(actor).or_default();
        *tick += 1;
        Stamp { actor, tick: *tick }
    }

    pub(crate) fn knows(&self, stamp: Stamp) -> bool {
        self.0.get(&stamp.actor).is_some_and(|&tick| tick >= stamp.tick)
    }
}

/// Address ranges, sorted, none touching the next.
#[derive(Clone, Default)]
pub(crate) struct Ranges(Vec<(u64, u64)>);

impl Ranges {
    /// The union of `ranges`, and a range where two of them overlap.
    pub(crate) fn union(mut ranges: Vec<(u64, u64)>) -> (Self, Option<(u64, u64)>) {
        ranges.retain(|&(from, to)| from < to);
        ranges.sort_unstable();
        let mut union: Vec<(u64, u64)> = Vec::with_capacity(ranges.len());
        let mut overlap = None;
        for (from, to) in ranges {
            match union.last_mut() {
                Some(last) if from <= last.1 => {
                    if from < last.1 {
                        overlap = overlap.or(Some((from, to.min(last.1))));
                    }
                    last.1 = last.1.max(to);
                }
                _ => union.push((from, to)),
            }
        }
        (Self(union), overlap)
    }

    /// A range that both hold.
    pub(crate) fn common(&self, other: &Self) -> Option<(u64, u64)> {
        let (mut i, mut j) = (0, 0);
        while let (Some(&(a, b)), Some(&(c, d))) = (self.0.get(i), other.0.get(j)) {
            if a.max(c) < b.min(d) {
                return Some((a.max(c), b.min(d)));
            }
            if b <= d {
                i += 1;
            } else {
                j += 1;
            }
        }
        None
    }
}

/// What one operation reads and writes, and what was known when it was asked for.
pub(crate) struct Access {
    pub(crate) stamp: Stamp,
    pub(crate) clock: Clock,
    pub(crate) reads: Ranges,
    pub(crate) writes: Ranges,
    pub(crate) what: String,
}

impl Access {
    fn is_ordered_with(&self, other: &Self) -> bool {
        self.clock.knows(other.stamp) || other.clock.knows(self.stamp)
    }

    fn conflict(&self, other: &Self) -> Option<(u64, u64, &'static str)> {
        let found = |with: &Ranges, of: &Ranges, how| with.common(of).map(|(a, b)| (a, b, how));
        found(&self.writes, &other.writes, "writes what it writes")
            .or_else(|| found(&self.writes, &other.reads, "writes what it reads"))
            .or_else(|| found(&self.reads, &other.writes, "reads what it writes"))
    }
}

/// The accesses that the host does not yet know to have ended.
#[derive(Default)]
pub(crate) struct Clocks {
    pub(crate) host: Clock,
    history: Vec<Access>,
    /// Kernels whose accesses will be known when they run; until then nothing is forgotten.
    unresolved: u32,
}

impl Clocks {
    /// Enters an access; a message where it races with another.
    pub(crate) fn enter(&mut self, access: Access) -> Option<String> {
        let race = self.race(&access);
        self.history.push(access);
        self.forget();
        race
    }

    fn race(&self, access: &Access) -> Option<String> {
        self.history.iter().filter(|other| !access.is_ordered_with(other)).find_map(|other| {
            let (from, to, how) = access.conflict(other)?;
            let bytes = to - from;
            Some(format!(
                "race: {} and {}, of which no order is known: the first {how} at {from:#x}, {bytes} bytes",
                access.what, other.what
            ))
        })
    }

    /// The host knows what `clock` knows.
    pub(crate) fn observe(&mut self, clock: &Clock) {
        self.host.join(clock);
        self.forget();
    }

    /// What the host knows is before all that it will ask for.
    fn forget(&mut self) {
        if self.unresolved == 0 {
            self.history.retain(|access| !self.host.knows(access.stamp));
        }
    }

    /// An operation on part of `from..to` that the host has not seen the end of.
    pub(crate) fn unseen(&self, from: u64, to: u64) -> Option<&str> {
        let ranges = Ranges(vec![(from, to)]);
        let touches = |access: &&Access| {
            !self.host.knows(access.stamp)
                && (ranges.common(&access.reads).is_some()
                    || ranges.common(&access.writes).is_some())
        };
        self.history.iter().find(touches).map(|access| access.what.as_str())
    }

    /// Nothing that was asked for runs any more.
    pub(crate) fn drop_all(&mut self) {
        self.history.clear();
    }

    pub(crate) fn begin_kernel(&mut self) {
        self.unresolved += 1;
    }

    pub(crate) fn end_kernel(&mut self) {
        self.unresolved = self.unresolved.saturating_sub(1);
        self.forget();
    }
}

impl State {
    /// Enters an access and reports a race.
    pub(crate) fn access(&mut self, access: Access) {
        if let Some(race) = self.clocks.enter(access) {
            self.report(&race);
        }
    }

    /// Enters an access of the host, which ends before anything else is asked for.
    pub(crate) fn host_access(&mut self, reads: Vec<(u64, u64)>, writes: Vec<(u64, u64)>) {
        let stamp = self.clocks.host.tick(HOST);
        let clock = self.clocks.host.clone();
        let (reads, writes) = (Ranges::union(reads).0, Ranges::union(writes).0);
        self.access(Access { stamp, clock, reads, writes, what: "an access of the host".into() });
    }
}

/// Says that the host touches `bytes` at `pointer`: `write` is 0 where it only reads. Within a host function
/// (cuLaunchHostFunc) it is an access of that function's stream. Returns 1 where this is a race, else 0.
#[unsafe(no_mangle)]
extern "C" fn fakeCudaHostAccess(pointer: u64, bytes: usize, write: i32) -> i32 {
    let mut state = lock();
    let Ok(touched) = range(pointer, bytes_of(bytes)) else { return 1 };
    let before = state.violations.len();
    let (reads, writes) =
        if write == 0 { (vec![touched], Vec::new()) } else { (Vec::new(), vec![touched]) };
    if let Some((stamp, clock)) = host_function_stream() {
        let (reads, writes) = (Ranges::union(reads).0, Ranges::union(writes).0);
        let what = "an access of a host function".into();
        state.access(Access { stamp, clock, reads, writes, what });
    } else {
        state.host_access(reads, writes);
    }
    i32::from(state.violations.len() > before)
}
