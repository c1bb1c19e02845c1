//! What the server counts and measures of itself, for whoever asks: peers, HTTP, the process around it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::AtomicUsize;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvferry_store::Store;
use kvferry_store::latencies::{Histogram, Latencies};
use kvferry_wire::Operation;

use crate::connection::Unfinished;
use crate::notes::{Level, Notes};

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
}
