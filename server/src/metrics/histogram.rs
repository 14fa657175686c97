//! How long things take, counted without a lock: `prometheus-client`'s own
//! histogram takes one for each observation.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Upper bounds in nanoseconds: from a small batch to a call that was given up.
const BOUNDS_NS: [u64; 14] = [
    5_000,
    25_000,
    100_000,
    250_000,
    1_000_000,
    2_500_000,
    10_000_000,
    25_000_000,
    100_000_000,
    250_000_000,
    1_000_000_000,
    2_500_000_000,
    10_000_000_000,
    30_000_000_000,
];

const BUCKETS: usize = BOUNDS_NS.len() + 1;

/// Durations, counted. How many there were is the sum of the buckets.
#[derive(Debug)]
pub(super) struct Histogram {
    buckets: [AtomicU64; BUCKETS],
    sum_ns: AtomicU64,
}

/// A histogram at one time, or several together.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Snapshot {
    counts: [u64; BUCKETS],
    sum_ns: u64,
}

impl Histogram {
    pub(super) const fn new() -> Histogram {
        Histogram {
            buckets: [const { AtomicU64::new(0) }; BUCKETS],
            sum_ns: AtomicU64::new(0),
        }
    }

    /// Two relaxed additions.
    pub(super) fn observe(&self, took: Duration) {
        let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        let bucket = BOUNDS_NS.partition_point(|bound| *bound < ns);
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        self.sum_ns.fetch_add(ns, Ordering::Relaxed);
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        Snapshot {
            counts: std::array::from_fn(|bucket| self.buckets[bucket].load(Ordering::Relaxed)),
            sum_ns: self.sum_ns.load(Ordering::Relaxed),
        }
    }
}

impl Snapshot {
    pub(super) fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    pub(super) fn plus(mut self, other: &Snapshot) -> Snapshot {
        for (own, others) in self.counts.iter_mut().zip(other.counts) {
            *own += others;
        }
        self.sum_ns += other.sum_ns;
        self
    }

    #[expect(
        clippy::cast_precision_loss,
        reason = "seconds for people: 53 bits of nanoseconds are 104 days"
    )]
    pub(super) fn sum_seconds(&self) -> f64 {
        self.sum_ns as f64 / 1e9
    }

    /// Upper bounds in seconds, each with what lies below it and above the one
    /// before.
    #[expect(clippy::cast_precision_loss, reason = "the bounds are small")]
    pub(super) fn buckets(&self) -> [(f64, u64); BUCKETS] {
        std::array::from_fn(|bucket| {
            let bound = BOUNDS_NS.get(bucket);
            let seconds = bound.map_or(f64::INFINITY, |ns| *ns as f64 / 1e9);
            (seconds, self.counts[bucket])
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_takes_exactly_as_long_as_a_bound_counts_below_it() {
        let histogram = Histogram::new();
        for ns in [
            0,
            5_000,
            5_001,
            30_000_000_000,
            30_000_000_001,
            u64::MAX / 4,
        ] {
            histogram.observe(Duration::from_nanos(ns));
        }
        let snapshot = histogram.snapshot();
        let buckets = snapshot.buckets();
        assert_eq!(buckets[0], (0.000_005, 2));
        assert_eq!(buckets[1], (0.000_025, 1));
        assert_eq!(buckets[BUCKETS - 2], (30.0, 1));
        assert_eq!(buckets[BUCKETS - 1], (f64::INFINITY, 2));
        assert_eq!(snapshot.count(), 6);
    }

    #[test]
    fn two_together_are_the_sum_of_both() {
        let (one, two) = (Histogram::new(), Histogram::new());
        one.observe(Duration::from_millis(500));
        two.observe(Duration::from_millis(500));
        two.observe(Duration::from_secs(3));
        let both = one.snapshot().plus(&two.snapshot());
        assert_eq!((both.count(), both.sum_seconds()), (3, 4.0));
    }
}
