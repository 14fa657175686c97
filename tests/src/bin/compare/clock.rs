//! How time is taken.
//!
//! Means come from batches that are long against the clock. Percentiles need
//! each operation for itself: two readings of `Instant` around it, less what
//! two readings with nothing between them take (their median, taken at start).
//! They are as coarse as the clock, whose steps can be 10 ns; that does not
//! matter in a tail.

use std::hint::black_box;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Readings from which the clock's own cost is taken.
const READINGS: usize = 100_001;

/// Times single operations.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    /// What it adds to every operation.
    overhead_ns: u32,
}

impl Clock {
    pub(crate) fn calibrate() -> Clock {
        let mut empty: Vec<u32> = (0..READINGS)
            .map(|_| nanos(Instant::now().elapsed()))
            .collect();
        empty.sort_unstable();
        Clock {
            overhead_ns: Share::HALF.of(&empty),
        }
    }

    pub(crate) fn overhead_ns(self) -> u32 {
        self.overhead_ns
    }

    /// What `work` gives, and the nanoseconds that it took.
    #[inline]
    pub(crate) fn time<T>(self, work: impl FnOnce() -> T) -> (T, u32) {
        let start = Instant::now();
        let done = black_box(work());
        let took = nanos(start.elapsed());
        (done, took.saturating_sub(self.overhead_ns))
    }
}

fn nanos(took: Duration) -> u32 {
    u32::try_from(took.as_nanos()).unwrap_or(u32::MAX)
}

/// So many in a thousand of all samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Share(usize);

impl Share {
    pub(crate) const HALF: Share = Share(500);
    pub(crate) const P99: Share = Share(990);
    pub(crate) const P99_9: Share = Share(999);
    pub(crate) const ALL: Share = Share(1000);

    /// The smallest of the sorted samples that so many do not exceed.
    ///
    /// # Panics
    /// Without samples.
    pub(crate) fn of(self, sorted: &[u32]) -> u32 {
        let rank = (sorted.len() * self.0).div_ceil(1000).max(1);
        sorted[rank - 1]
    }

    /// Fewer samples than this say nothing about it.
    pub(crate) fn least_samples(self) -> usize {
        match self {
            Share::P99_9 => 1000,
            Share::P99 => 100,
            _ => 1,
        }
    }
}

/// The middle one of several results.
pub(crate) fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_unstable_by(f64::total_cmp);
    let middle = values.len() / 2;
    let upper = *values.get(middle)?;
    match values.len() % 2 {
        0 => Some((values[middle - 1] + upper) / 2.0),
        _ => Some(upper),
    }
}

/// Repeats an operation for about as long as it is told to.
///
/// The first run finds out how often that is.
#[derive(Debug)]
pub(crate) struct Batch {
    length: Duration,
    ops: Option<u64>,
}

impl Batch {
    pub(crate) fn lasting(length: Duration) -> Batch {
        Batch { length, ops: None }
    }

    /// Nanoseconds of one operation, of which `work` does as many as it is
    /// asked to and says how long they took.
    pub(crate) fn run(&mut self, mut work: impl FnMut(u64) -> Duration) -> f64 {
        let ops = *self
            .ops
            .get_or_insert_with(|| fitting(self.length, &mut work));
        // The others have had the caches.
        work(ops.div_ceil(4));
        work(ops).as_secs_f64() * 1e9 / as_f64(ops)
    }
}

/// Doubles until a tenth of the length is reached: what comes before is warm-up.
fn fitting(length: Duration, work: &mut impl FnMut(u64) -> Duration) -> u64 {
    let mut ops = 1;
    loop {
        let took = work(ops);
        if took * 10 >= length {
            let times = length.as_nanos() * u128::from(ops) / took.as_nanos().max(1);
            return u64::try_from(times).unwrap_or(u64::MAX).max(1);
        }
        ops = ops.checked_mul(2).expect("the work takes time");
    }
}

/// Runs both at the same time; the mean of their times.
pub(crate) fn race(
    first: impl FnOnce() -> Duration + Send,
    second: impl FnOnce() -> Duration + Send,
) -> Duration {
    let absent = AtomicUsize::new(2);
    // A sleeping thread comes tens of microseconds late.
    let meet = || {
        absent.fetch_sub(1, Ordering::AcqRel);
        while absent.load(Ordering::Acquire) > 0 {
            thread::yield_now();
        }
    };
    thread::scope(|scope| {
        let other = scope.spawn(|| {
            meet();
            second()
        });
        meet();
        let took = first();
        let other = other.join().unwrap_or_else(|panic| resume_unwind(panic));
        (took + other) / 2
    })
}

/// For ratios; no count here comes near 2^53.
pub(crate) fn as_f64(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_the_smallest_sample_that_covers_it() {
        let samples: Vec<u32> = (1..=1000).collect();
        let of = |share: Share| share.of(&samples);
        assert_eq!(of(Share::HALF), 500);
        assert_eq!(of(Share::P99), 990);
        assert_eq!(of(Share::P99_9), 999);
        assert_eq!(of(Share::ALL), 1000);
        assert_eq!(Share::P99_9.of(&[7]), 7);
        assert_eq!(Share::HALF.of(&[1, 9]), 1);
    }

    #[test]
    fn the_median_of_an_even_number_lies_between_the_middle_two() {
        assert_eq!(median(vec![4.0, 1.0, 3.0]), Some(3.0));
        assert_eq!(median(vec![4.0, 1.0]), Some(2.5));
        assert_eq!(median(Vec::new()), None);
    }

    #[test]
    fn a_batch_asks_for_as_many_operations_as_its_length_takes() {
        let ten_each = |ops: u64| Duration::from_nanos(10 * ops);
        let mut batch = Batch::lasting(Duration::from_micros(10));
        let per_op = batch.run(ten_each);
        assert!((per_op - 10.0).abs() < 1e-6);
        assert_eq!(batch.ops, Some(1000));
    }
}
