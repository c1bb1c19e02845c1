//! What the server counts and measures of itself, for whoever asks: peers, HTTP, the process around it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvferry_store::Store;
use kvferry_wire::Operation;

use crate::connection::Unfinished;
use crate::notes::{Level, Notes};

/// Upper bounds of the latencies' buckets, in nanoseconds: 10 µs to 1 s.
pub(crate) const BOUNDS: [u64; 16] = [
    10_000,
    25_000,
    50_000,
    100_000,
    250_000,
    500_000,
    1_000_000,
    2_500_000,
    5_000_000,
    10_000_000,
    25_000_000,
    50_000_000,
    100_000_000,
    250_000_000,
    500_000_000,
    1_000_000_000,
];

/// An operation that took so long is remembered.
const SLOW: Duration = Duration::from_millis(100);
/// So many of them.
const SLOW_MAX: usize = 20;

/// An operation that took long.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Slow {
    pub(crate) operation: Operation,
    pub(crate) took: Duration,
    pub(crate) ended: Instant,
}

/// How often something took how long.
#[derive(Debug, Default)]
struct Histogram {
    /// By the first bound that it kept to; the last is for none of them.
    buckets: [AtomicU64; BOUNDS.len() + 1],
    nanos: AtomicU64,
}

/// A histogram at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Latencies {
    /// Counts up to each of [`BOUNDS`], cumulative; the last is the count of all.
    pub(crate) counts: [u64; BOUNDS.len() + 1],
    /// The sum of all, in nanoseconds.
    pub(crate) nanos: u64,
}

impl Histogram {
    fn observe(&self, took: Duration) {
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        let bucket = BOUNDS.partition_point(|bound| *bound < nanos);
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        self.nanos.fetch_add(nanos, Ordering::Relaxed);
    }

    fn read(&self) -> Latencies {
        let mut count = 0;
        let counts = std::array::from_fn(|bucket| {
            count += self.buckets[bucket].load(Ordering::Relaxed);
            count
        });
        Latencies { counts, nanos: self.nanos.load(Ordering::Relaxed) }
    }
}

impl Latencies {
    pub(crate) fn count(&self) -> u64 {
        self.counts[BOUNDS.len()]
    }

    /// The bound that this part of all kept to, in nanoseconds; `None` when it is above all bounds.
    pub(crate) fn bound(&self, part: f64) -> Option<u64> {
        #[expect(clippy::cast_precision_loss, reason = "a rank, give or take one in 2^53")]
        let rank = part * self.count() as f64;
        #[expect(clippy::cast_precision_loss, reason = "as above")]
        let bucket = self.counts.iter().position(|count| *count as f64 >= rank)?;
        BOUNDS.get(bucket).copied()
    }
}

/// What a probe of the store has added to the store's figures, by name.
pub(crate) type Probed = BTreeMap<&'static str, u64>;

/// Counters and gauges of one server, shared by its threads.
pub(crate) struct Figures {
    started: Instant,
    dropped: Mutex<BTreeMap<&'static str, u64>>,
    latencies: [Histogram; Operation::ALL.len()],
    /// Latest last.
    slow: Mutex<VecDeque<Slow>>,
    /// Held while a probe is under way, so that nobody sees half of one: a counter would go up and down.
    probed: Mutex<Probed>,
    /// For a log.
    pub(crate) notes: Notes,
    /// Connections of peers.
    pub(crate) connections: AtomicUsize,
    /// What they hold of messages that have not arrived whole.
    pub(crate) unfinished: Unfinished,
}

impl Figures {
    pub(crate) fn new() -> Self {
        Self {
            started: Instant::now(),
            dropped: Mutex::default(),
            latencies: std::array::from_fn(|_| Histogram::default()),
            slow: Mutex::default(),
            probed: Mutex::default(),
            notes: Notes::default(),
            connections: AtomicUsize::new(0),
            unfinished: Unfinished::default(),
        }
    }

    pub(crate) fn uptime(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.started)
    }

    /// Counts what was dropped, by why.
    pub(crate) fn drop_message(&self, label: &'static str) {
        *self.lock_dropped().entry(label).or_default() += 1;
        self.notes.add(Level::Warn, "messages_dropped", label, label.to_lowercase());
    }

    /// Messages and connections that were dropped, by why.
    pub(crate) fn dropped(&self) -> BTreeMap<&'static str, u64> {
        self.lock_dropped().clone()
    }

    /// An operation was answered. Neither waits nor allocates, unless it was slow.
    pub(crate) fn observe(&self, operation: Operation, took: Duration) {
        self.latencies[operation as usize].observe(took);
        if took < SLOW {
            return;
        }
        let detail = format!("{operation} took {} ms", took.as_millis());
        self.notes.add(Level::Warn, "operation_slow", operation.name(), detail);
        let mut slow = self.slow.lock().unwrap_or_else(PoisonError::into_inner);
        if slow.len() >= SLOW_MAX {
            slow.pop_front();
        }
        slow.push_back(Slow { operation, took, ended: Instant::now() });
    }

    /// The latest operations that took 100 ms or more, latest first.
    pub(crate) fn slow(&self) -> Vec<Slow> {
        let slow = self.slow.lock().unwrap_or_else(PoisonError::into_inner);
        slow.iter().rev().copied().collect()
    }

    /// The latencies of all operations, in the order of [`Operation::ALL`].
    pub(crate) fn latencies(&self) -> impl Iterator<Item = (Operation, Latencies)> {
        Operation::ALL.into_iter().zip(self.latencies.iter().map(Histogram::read))
    }

    /// The store's figures, without what probes have added to them.
    pub(crate) fn store(&self, store: &Store, now: Instant) -> Vec<(&'static str, u64)> {
        let probed = self.probing();
        let mut figures = store.status(now);
        for (name, value) in &mut figures {
            *value = value.saturating_sub(probed.get(name).copied().unwrap_or(0));
        }
        figures
    }

    /// To be held during a probe, and not for long.
    pub(crate) fn probing(&self) -> MutexGuard<'_, Probed> {
        self.probed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_dropped(&self) -> MutexGuard<'_, BTreeMap<&'static str, u64>> {
        self.dropped.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operation_has_its_own_place() {
        for (place, operation) in Operation::ALL.into_iter().enumerate() {
            assert_eq!(operation as usize, place, "{operation}");
        }
    }

    #[test]
    fn the_latest_slow_operations_are_remembered() {
        let figures = Figures::new();
        figures.observe(Operation::Ping, SLOW - Duration::from_nanos(1));
        assert!(figures.slow().is_empty());
        for ms in 100..150 {
            figures.observe(Operation::Lookup, Duration::from_millis(ms));
        }
        let took: Vec<_> = figures.slow().iter().map(|one| one.took.as_millis()).collect();
        assert_eq!(took, (130..150).rev().collect::<Vec<u128>>());
    }

    #[test]
    fn a_latency_counts_up_to_the_first_bound_that_it_keeps_to() {
        let histogram = Histogram::default();
        for nanos in [0, 10_000, 10_001, 1_000_000_000, 1_000_000_001, u64::MAX >> 1] {
            histogram.observe(Duration::from_nanos(nanos));
        }
        let read = histogram.read();
        assert_eq!(read.counts[..3], [2, 3, 3]);
        assert_eq!(read.counts[BOUNDS.len() - 2..], [3, 4, 6]);
        assert_eq!(read.count(), 6);
    }

    #[test]
    fn a_quantile_is_told_by_the_bound_that_is_not_below_it() {
        let histogram = Histogram::default();
        for _ in 0..99 {
            histogram.observe(Duration::from_micros(20));
        }
        histogram.observe(Duration::from_millis(7));
        let read = histogram.read();
        assert_eq!(read.bound(0.5), Some(25_000));
        assert_eq!(read.bound(0.99), Some(25_000));
        assert_eq!(read.bound(1.0), Some(10_000_000));
        histogram.observe(Duration::from_secs(2));
        assert_eq!(histogram.read().bound(1.0), None);
    }
}
