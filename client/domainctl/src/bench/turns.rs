//! Who measures, and when: an operation of ours and its floor by turns, so that
//! whatever else happens on the machine happens to both.

use std::panic::resume_unwind;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::latency::{Lap, Latencies};

/// Long against one operation, short against what else happens.
const TURN: Duration = Duration::from_millis(10);

/// What one thread of a scenario does.
pub(super) trait Work: Send {
    /// Does the operation, or a batch of them, and times it. What has to be
    /// done before or after is not in the time.
    fn ours(&mut self) -> anyhow::Result<Lap>;

    /// The same for the least that such an operation could cost here.
    fn floor(&mut self) -> anyhow::Result<Lap>;
}

/// What the threads are told, and tell, while they measure.
#[derive(Debug, Default)]
pub(super) struct Watch {
    stop: AtomicBool,
    begun: OnceLock<Instant>,
}

/// What came of it.
#[derive(Clone, Debug)]
pub(super) struct Measured {
    pub(super) ours: Latencies,
    pub(super) floor: Latencies,
    /// Operations of ours a second, of all threads together, of the time that
    /// they spent on them.
    pub(super) ops_per_second: f64,
}

impl Watch {
    /// Everybody comes home after the operation that is under way.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Since the first turn began.
    pub(super) fn elapsed(&self) -> Duration {
        self.begun.get().map_or(Duration::ZERO, Instant::elapsed)
    }
}

/// Lets all work at the same time for so long, and until everybody has had both
/// turns. The first operation of each is warm-up.
///
/// # Errors
/// The first of one thread; the others stop.
pub(super) fn measure(
    mut work: Vec<Box<dyn Work>>,
    length: Duration,
    watch: &Watch,
) -> anyhow::Result<Measured> {
    for work in &mut work {
        work.ours()?;
        work.floor()?;
    }
    watch.begun.get_or_init(Instant::now);
    // Lent: whoever is done first must not take away what others work with.
    let all = thread::scope(|scope| {
        let start = |work| scope.spawn(move || take_turns(work, length, watch));
        let threads: Vec<_> = work.iter_mut().map(start).collect();
        let ends = threads.into_iter().map(|thread| thread.join());
        let ends = ends.map(|end| end.unwrap_or_else(|panic| resume_unwind(panic)));
        ends.collect::<Vec<anyhow::Result<Measured>>>()
    });
    sum(all)
}

fn take_turns(
    work: &mut Box<dyn Work>,
    length: Duration,
    watch: &Watch,
) -> anyhow::Result<Measured> {
    let (mut ours, mut floor) = (Latencies::new(), Latencies::new());
    let mut measure = || -> anyhow::Result<()> {
        while !watch.is_stopped() {
            let elapsed = watch.elapsed();
            let is_over = elapsed >= length;
            if is_over && !ours.is_empty() && !floor.is_empty() {
                break;
            }
            match is_over {
                false if is_ours(elapsed) => ours.record(work.ours()?),
                true if ours.is_empty() => ours.record(work.ours()?),
                _ => floor.record(work.floor()?),
            }
        }
        Ok(())
    };
    let measured = measure();
    if measured.is_err() {
        watch.stop();
    }
    measured?;
    Ok(Measured {
        ops_per_second: ours.per_second(),
        ours,
        floor,
    })
}

/// The clock says whose turn it is: so nobody waits for anybody.
fn is_ours(elapsed: Duration) -> bool {
    elapsed.as_nanos() / TURN.as_nanos() % 2 == 1
}

fn sum(all: Vec<anyhow::Result<Measured>>) -> anyhow::Result<Measured> {
    let mut sum = Measured {
        ours: Latencies::new(),
        floor: Latencies::new(),
        ops_per_second: 0.0,
    };
    for one in all {
        let one = one?;
        sum.ours.add(&one.ours);
        sum.floor.add(&one.floor);
        sum.ops_per_second += one.ops_per_second;
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    /// Takes what it says, without taking it.
    struct Pretence {
        ours_ns: u64,
        floor_ns: u64,
        /// Fails at this many operations of ours.
        fails_after: u64,
        done: u64,
    }

    fn pretence(ours_ns: u64, floor_ns: u64) -> Pretence {
        Pretence {
            ours_ns,
            floor_ns,
            fails_after: u64::MAX,
            done: 0,
        }
    }

    impl Work for Pretence {
        fn ours(&mut self) -> anyhow::Result<Lap> {
            self.done += 1;
            anyhow::ensure!(self.done < self.fails_after, "it fails");
            Ok(lap(self.ours_ns))
        }

        fn floor(&mut self) -> anyhow::Result<Lap> {
            Ok(lap(self.floor_ns))
        }
    }

    fn lap(nanos: u64) -> Lap {
        Lap {
            took: Duration::from_nanos(nanos),
            ops: 1,
        }
    }

    #[test]
    fn threads_measure_the_same_things_and_their_rates_add_up() {
        let work = || -> Box<dyn Work> { Box::new(pretence(2_000, 1_000)) };

        // No turn is so short: both are had all the same.
        for length in [Duration::ZERO, Duration::from_millis(25)] {
            let measured = measure(vec![work(), work()], length, &Watch::default()).unwrap();

            assert!((measured.ours.quantile_ns(0.5) / 2_000.0 - 1.0).abs() < 1e-3);
            assert!((measured.floor.quantile_ns(0.5) / 1_000.0 - 1.0).abs() < 1e-3);
            assert!((measured.ops_per_second / 1e6 - 1.0).abs() < 1e-3);
        }
    }

    #[test]
    fn the_floor_begins_and_then_it_is_turn_by_turn() {
        let turns = (0..4).map(|turn| is_ours(TURN * turn));
        assert!(turns.eq([false, true, false, true]));
    }

    #[test]
    fn one_that_fails_stops_the_others() {
        let failing = Pretence {
            fails_after: 3,
            ..pretence(1, 1)
        };
        let work: Vec<Box<dyn Work>> = vec![Box::new(pretence(1, 1)), Box::new(failing)];

        let error = measure(work, Duration::MAX, &Watch::default()).unwrap_err();

        assert_eq!(error.to_string(), "it fails");
    }

    /// Others work with what it brought.
    struct Provider {
        is_gone: Arc<AtomicBool>,
        is_slow: bool,
    }

    impl Work for Provider {
        fn ours(&mut self) -> anyhow::Result<Lap> {
            if self.is_slow {
                thread::sleep(Duration::from_millis(30));
            }
            anyhow::ensure!(!self.is_gone.load(Ordering::Relaxed), "somebody has left");
            Ok(lap(1))
        }

        fn floor(&mut self) -> anyhow::Result<Lap> {
            Ok(lap(1))
        }
    }

    impl Drop for Provider {
        fn drop(&mut self) {
            self.is_gone.store(true, Ordering::Relaxed);
        }
    }

    #[test]
    fn nobody_leaves_before_all_are_done() {
        let is_gone = Arc::new(AtomicBool::new(false));
        let provider = |is_slow| -> Box<dyn Work> {
            Box::new(Provider {
                is_gone: Arc::clone(&is_gone),
                is_slow,
            })
        };
        let work = vec![provider(false), provider(true)];

        measure(work, Duration::ZERO, &Watch::default()).unwrap();

        assert!(is_gone.load(Ordering::Relaxed));
    }

    #[test]
    fn who_is_stopped_comes_home() {
        let watch = Watch::default();
        watch.stop();
        let work: Vec<Box<dyn Work>> = vec![Box::new(pretence(1, 1))];

        let measured = measure(work, Duration::MAX, &watch).unwrap();

        assert!(measured.ours.is_empty() && measured.floor.is_empty());
    }
}
