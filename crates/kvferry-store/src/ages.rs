//! For how long what made room had not been used.

use std::time::Duration;

/// Upper bounds of the buckets, in seconds: a second to a week.
pub const AGE_BOUNDS: [u64; 10] = [1, 10, 60, 300, 1_800, 3_600, 14_400, 43_200, 86_400, 604_800];

/// A histogram of ages.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Ages {
    /// By the first bound that they kept to; the last is for none of them.
    counts: [u64; AGE_BOUNDS.len() + 1],
    sum: Duration,
}

impl Ages {
    pub(crate) fn count(&mut self, age: Duration) {
        let bucket = AGE_BOUNDS.partition_point(|bound| Duration::from_secs(*bound) < age);
        self.counts[bucket] += 1;
        self.sum = self.sum.saturating_add(age);
    }

    /// Counts up to each of [`AGE_BOUNDS`]; the last is the count of all.
    pub fn cumulative(&self) -> [u64; AGE_BOUNDS.len() + 1] {
        let mut sum = 0;
        self.counts.map(|count| {
            sum += count;
            sum
        })
    }

    /// All ages together.
    pub fn sum(&self) -> Duration {
        self.sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_age_counts_up_to_the_first_bound_that_it_keeps_to() {
        let mut ages = Ages::default();
        for ms in [0, 1_000, 1_001, 604_800_000, 604_800_001] {
            ages.count(Duration::from_millis(ms));
        }
        assert_eq!(ages.cumulative(), [2, 3, 3, 3, 3, 3, 3, 3, 3, 4, 5]);
        assert_eq!(ages.sum().as_millis(), 1_209_602_002);
    }
}
