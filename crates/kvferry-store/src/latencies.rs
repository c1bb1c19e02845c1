//! How long things take, counted in buckets.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Upper bounds of the buckets, in nanoseconds: 10 µs to 1 s.
pub const BOUNDS: [u64; 16] = [
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

/// How often something took how long.
#[derive(Debug, Default)]
pub struct Histogram {
    /// By the first bound that it kept to; the last is for none of them.
    buckets: [AtomicU64; BOUNDS.len() + 1],
    nanos: AtomicU64,
}

/// A histogram at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Latencies {
    /// Counts up to each of [`BOUNDS`], cumulative; the last is the count of all.
    pub counts: [u64; BOUNDS.len() + 1],
    /// The sum of all, in nanoseconds.
    pub nanos: u64,
}

impl Histogram {
    /// Something took this long. Neither waits nor allocates.
    pub fn observe(&self, took: Duration) {
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        let bucket = BOUNDS.partition_point(|bound| *bound < nanos);
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        self.nanos.fetch_add(nanos, Ordering::Relaxed);
    }

    /// What was observed so far.
    pub fn read(&self) -> Latencies {
        let mut count = 0;
        let counts = std::array::from_fn(|bucket| {
            count += self.buckets[bucket].load(Ordering::Relaxed);
            count
        });
        Latencies { counts, nanos: self.nanos.load(Ordering::Relaxed) }
    }
}

impl Latencies {
    /// How often.
    pub fn count(&self) -> u64 {
        self.counts[BOUNDS.len()]
    }

    /// The bound that this part of all kept to, in nanoseconds; `None` when it is above all bounds.
    pub fn bound(&self, part: f64) -> Option<u64> {
        #[expect(clippy::cast_precision_loss, reason = "a rank, give or take one in 2^53")]
        let rank = part * self.count() as f64;
        #[expect(clippy::cast_precision_loss, reason = "as above")]
        let bucket = self.counts.iter().position(|count| *count as f64 >= rank)?;
        BOUNDS.get(bucket).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
