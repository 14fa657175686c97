//! How long single operations took.

use std::time::Duration;

use hdrhistogram::Histogram;

/// What was measured between two readings of the clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Lap {
    pub(super) took: Duration,
    /// How many operations that was, at least one.
    pub(super) ops: u64,
}

/// Latencies in bounded memory, to three significant digits.
#[derive(Clone, Debug)]
pub(super) struct Latencies {
    /// In picoseconds: an operation of a batch may take few nanoseconds.
    picos: Histogram<u64>,
    busy: Duration,
}

/// One step of the drawing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Step {
    /// Where it begins, in nanoseconds.
    pub(super) from_ns: f64,
    /// How many of all operations lie in it, 0 to 1.
    pub(super) share: f64,
}

/// Of a nanosecond.
const PICOS: f64 = 1e3;
/// An hour. What takes longer counts as that.
const PICOS_MOST: u64 = 3_600_000_000_000_000;

impl Latencies {
    pub(super) fn new() -> Latencies {
        Latencies {
            picos: Histogram::new_with_max(PICOS_MOST, 3).expect("good bounds"),
            busy: Duration::ZERO,
        }
    }

    /// Each operation of a lap counts with their mean.
    pub(super) fn record(&mut self, lap: Lap) {
        let picos = lap.took.as_nanos() * 1000 / u128::from(lap.ops);
        let picos = u64::try_from(picos).unwrap_or(u64::MAX);
        self.picos.saturating_record_n(picos, lap.ops);
        self.busy += lap.took;
    }

    /// Takes in what another thread has measured.
    pub(super) fn add(&mut self, other: &Latencies) {
        self.picos += &other.picos;
        self.busy += other.busy;
    }

    pub(super) fn is_empty(&self) -> bool {
        self.picos.is_empty()
    }

    /// Operations in a second of those that were measured; 0 without any.
    pub(super) fn per_second(&self) -> f64 {
        match self.busy {
            Duration::ZERO => 0.0,
            busy => self.picos.len() as f64 / busy.as_secs_f64(),
        }
    }

    /// What so many of all did not exceed (0.5: half of them), in nanoseconds.
    pub(super) fn quantile_ns(&self, share: f64) -> f64 {
        self.picos.value_at_quantile(share) as f64 / PICOS
    }

    /// All of them in at most `most` steps of equal ratio. What 999 in 1000 do
    /// not exceed spans them; the few that took longer count in the last.
    pub(super) fn steps(&self, most: usize) -> Vec<Step> {
        let (low, high) = (
            self.quantile_ns(0.0).max(1.0 / PICOS),
            self.quantile_ns(0.999),
        );
        // Finer than the histogram is would leave gaps.
        let ratio = (high / low).powf(1.0 / most as f64).max(1.003);
        let mut counts = vec![0_u64; most];
        for value in self.picos.iter_recorded() {
            let ns = value.value_iterated_to() as f64 / PICOS;
            let step = (ns / low).ln() / ratio.ln();
            counts[whole(step).min(most - 1)] += value.count_since_last_iteration();
        }
        let used = counts.iter().rposition(|count| *count > 0);
        counts.truncate(used.map_or(0, |last| last + 1));
        let all = self.picos.len() as f64;
        (0..)
            .zip(counts)
            .map(|(step, count)| Step {
                from_ns: low * ratio.powi(step),
                share: count as f64 / all,
            })
            .collect()
    }
}

/// Rounded down, and never below 0.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "it saturates, which is as good"
)]
fn whole(step: f64) -> usize {
    step as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_nanos(nanos: impl IntoIterator<Item = u64>) -> Latencies {
        let mut latencies = Latencies::new();
        for nanos in nanos {
            let took = Duration::from_nanos(nanos);
            latencies.record(Lap { took, ops: 1 });
        }
        latencies
    }

    fn is_near(value: f64, wanted: f64) -> bool {
        (value / wanted - 1.0).abs() < 2e-3
    }

    #[test]
    fn a_quantile_is_what_so_many_do_not_exceed() {
        let latencies = of_nanos(1..=1000);

        for (share, wanted) in [(0.5, 500.0), (0.99, 990.0), (0.999, 999.0), (1.0, 1000.0)] {
            let found = latencies.quantile_ns(share);
            assert!(is_near(found, wanted), "{share}: {found}");
        }
        assert!(is_near(latencies.per_second(), 1000.0 / 500_500e-9));
    }

    #[test]
    fn operations_of_a_batch_count_each_with_a_fraction_of_a_nanosecond() {
        let mut latencies = Latencies::new();
        let took = Duration::from_nanos(2_345);
        latencies.record(Lap { took, ops: 1000 });

        assert!(is_near(latencies.quantile_ns(0.5), 2.345));
        assert!(is_near(latencies.per_second(), 1000.0 / 2_345e-9));
    }

    #[test]
    fn what_threads_have_measured_is_added_up() {
        let mut all = of_nanos([100; 3]);
        assert!(!all.is_empty() && Latencies::new().is_empty());

        all.add(&of_nanos([900; 3]));

        assert!(is_near(all.quantile_ns(0.5), 100.0));
        assert!(is_near(all.quantile_ns(0.51), 900.0));
        assert!(is_near(all.per_second(), 2e6));
        assert!(Latencies::new().per_second() < f64::EPSILON);
    }

    #[test]
    fn the_steps_hold_every_operation_once() {
        // Two heaps, and one that took very long.
        let nanos = [1_000; 600]
            .into_iter()
            .chain([8_000; 3_000])
            .chain([1 << 40]);
        let steps = of_nanos(nanos).steps(12);

        assert_eq!(steps.len(), 12);
        let sum: f64 = steps.iter().map(|step| step.share).sum();
        assert!(is_near(sum, 1.0));
        assert!(is_near(steps[0].from_ns, 1_000.0) && is_near(steps[0].share, 600.0 / 3_601.0));
        assert!(is_near(steps[11].share, 3_001.0 / 3_601.0));
        assert!(steps.windows(2).all(|two| two[0].from_ns < two[1].from_ns));
    }

    #[test]
    fn what_always_takes_the_same_is_one_step_and_nothing_is_none() {
        let steps = of_nanos([500; 9]).steps(12);
        assert_eq!(steps.len(), 1);
        assert!(is_near(steps[0].share, 1.0));
        assert!(Latencies::new().steps(12).is_empty());
    }
}
