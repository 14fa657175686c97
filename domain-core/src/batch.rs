//! Requests of many entries: all of them, or each for itself.

use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Mutex, PoisonError};

use crate::crew::{Crew, Part};

/// What one refused entry means for the others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BatchMode {
    /// One refused entry refuses all, and nothing is changed.
    #[default]
    AllOrNothing,
    /// Each entry stands for itself.
    Partial,
}

/// The entry for which a whole batch was refused. The domain is as it was;
/// bytes that had been copied back to a driver before a copy failed stay
/// copied, as they would be again.
#[derive(Debug, thiserror::Error)]
#[error("entry {index}: {error}")]
pub struct BatchError<E> {
    /// Its place in the request, from 0.
    pub index: usize,
    /// Why.
    pub error: E,
}

/// One answer per entry, in the order of the request. Under
/// [`BatchMode::AllOrNothing`] all of them are `Ok`.
pub type BatchResult<T, E> = Result<Vec<Result<T, E>>, BatchError<E>>;

/// The first refusal of an all-or-nothing batch, taken out of it; a partial batch passes.
pub(crate) fn settle<J, E>(
    mode: BatchMode,
    entries: &mut Vec<Result<J, E>>,
) -> Result<(), BatchError<E>> {
    let first = entries.iter().position(Result::is_err);
    let Some(index) = first.filter(|_| mode == BatchMode::AllOrNothing) else {
        return Ok(());
    };
    match entries.remove(index) {
        Err(error) => Err(BatchError { index, error }),
        Ok(_) => unreachable!("it is refused"),
    }
}

/// How a batch is taken one step further.
pub(crate) struct Step<Weight, Take, Undo> {
    /// Bytes that one entry copies.
    pub(crate) weight: Weight,
    pub(crate) take: Take,
    /// What becomes of an entry of a partial batch that failed.
    pub(crate) undo: Undo,
}

/// Takes every entry that is still good one step further: in their order, or several at a time if
/// the crew divides so many bytes. An all-or-nothing batch stops at a failure and leaves its entries
/// for the caller to undo; of several that fail at the same time the first in the order is named.
pub(crate) fn advance<J: Send, E: Send>(
    mode: BatchMode,
    crew: &dyn Crew,
    entries: &mut [Result<J, E>],
    step: &Step<impl Fn(&J) -> u64, impl Fn(&mut J) -> Result<(), E> + Sync, impl Fn(J) + Sync>,
) -> Result<(), BatchError<E>> {
    let Step { weight, take, undo } = step;
    let weigh = |entry: &Result<J, E>| entry.as_ref().map_or(0, weight);
    let bytes = entries.iter().map(weigh).fold(0, u64::saturating_add);
    let parts = crew.parts(bytes).min(entries.len());
    let failed = AtomicBool::new(false);
    let walk = |index: usize, part: &mut [Result<J, E>]| -> Option<BatchError<E>> {
        for (index, entry) in (index..).zip(part) {
            let Ok(job) = entry else { continue };
            if failed.load(Relaxed) {
                return None;
            }
            match (take(job), mode) {
                (Ok(()), _) => {}
                (Err(error), BatchMode::AllOrNothing) => {
                    failed.store(true, Relaxed);
                    return Some(BatchError { index, error });
                }
                (Err(error), BatchMode::Partial) => {
                    if let Ok(job) = std::mem::replace(entry, Err(error)) {
                        undo(job);
                    }
                }
            }
        }
        None
    };
    if parts <= 1 {
        let mut stopped = None;
        crew.attend(bytes, &mut || stopped = walk(0, entries));
        return stopped.map_or(Ok(()), Err);
    }
    let first = Mutex::new(None::<BatchError<E>>);
    let report = |error: BatchError<E>| {
        let mut first = first.lock().unwrap_or_else(PoisonError::into_inner);
        if first.as_ref().is_none_or(|known| error.index < known.index) {
            *first = Some(error);
        }
    };
    let part = |(index, part): (usize, _)| -> Part<'_> {
        let (walk, report) = (&walk, &report);
        Box::new(move || walk(index, part).into_iter().for_each(report))
    };
    let divided = divide(entries, bytes.div_ceil(parts as u64), weigh);
    {
        let mut parts = divided.into_iter().map(part).collect();
        crew.attend(bytes, &mut || crew.run(std::mem::take(&mut parts)));
    }
    let first = first.into_inner().unwrap_or_else(PoisonError::into_inner);
    first.map_or(Ok(()), Err)
}

/// Cuts entries into runs of about so many bytes, each with the place of its first.
fn divide<T>(mut rest: &mut [T], bytes: u64, weigh: impl Fn(&T) -> u64) -> Vec<(usize, &mut [T])> {
    let mut runs = Vec::new();
    let mut index = 0;
    while !rest.is_empty() {
        let mut sum = 0;
        let is_full = |entry: &T| {
            sum += weigh(entry);
            sum >= bytes
        };
        let len = rest
            .iter()
            .position(is_full)
            .map_or(rest.len(), |last| last + 1);
        let (run, left) = rest.split_at_mut(len);
        runs.push((index, run));
        index += len;
        rest = left;
    }
    runs
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;
    use crate::crew::Alone;

    /// As many threads as parts.
    struct Many(usize);

    impl Crew for Many {
        fn attend(&self, _bytes: u64, work: &mut dyn FnMut()) {
            work();
        }

        fn parts(&self, _bytes: u64) -> usize {
            self.0
        }

        fn run(&self, parts: Vec<Part<'_>>) {
            std::thread::scope(|scope| {
                for part in parts {
                    scope.spawn(part);
                }
            });
        }
    }

    const CREWS: [&dyn Crew; 3] = [&Alone, &Many(2), &Many(7)];

    /// Doubles numbers, but for those that end in two.
    fn double(
        mode: BatchMode,
        crew: &dyn Crew,
        entries: &mut [Result<u64, &'static str>],
        undo: impl Fn(u64) + Sync,
    ) -> Result<(), BatchError<&'static str>> {
        let take = |number: &mut u64| {
            if *number % 10 == 2 {
                return Err("it ends in two");
            }
            *number *= 2;
            Ok(())
        };
        let step = Step {
            weight: |_: &u64| 1,
            take,
            undo,
        };
        advance(mode, crew, entries, &step)
    }

    fn no_undo(_: u64) {
        panic!("the caller undoes");
    }

    #[test]
    fn the_first_refusal_stops_an_all_or_nothing_batch() {
        let mut entries = vec![Ok(1), Err("second"), Err("third")];
        let stopped = settle(BatchMode::AllOrNothing, &mut entries).unwrap_err();
        assert_eq!((stopped.index, stopped.error), (1, "second"));
        let mut good = vec![Ok::<_, &str>(1)];
        assert!(settle(BatchMode::AllOrNothing, &mut good).is_ok());
    }

    #[test]
    fn a_partial_batch_keeps_every_answer() {
        let mut entries = vec![Ok(1), Err("second")];
        assert!(settle(BatchMode::Partial, &mut entries).is_ok());
        assert_eq!(entries, [Ok(1), Err("second")]);
        for crew in CREWS {
            let undone = AtomicUsize::new(0);
            let undo = |_| _ = undone.fetch_add(1, Relaxed);
            let mut entries: Vec<_> = (0..100).map(Ok).collect();
            entries[7] = Err("before");
            assert!(double(BatchMode::Partial, crew, &mut entries, undo).is_ok());
            for (number, entry) in (0..100).zip(entries) {
                let expected = match number {
                    7 => Err("before"),
                    _ if number % 10 == 2 => Err("it ends in two"),
                    _ => Ok(number * 2),
                };
                assert_eq!(entry, expected);
            }
            assert_eq!(undone.load(Relaxed), 10);
        }
    }

    #[test]
    fn nothing_is_done_behind_the_first_failure_of_an_all_or_nothing_batch() {
        let mut entries: Vec<_> = [1, 2, 3].map(Ok).into();
        let stopped = double(BatchMode::AllOrNothing, &Alone, &mut entries, no_undo).unwrap_err();
        assert_eq!(stopped.index, 1);
        assert_eq!(entries, [Ok(2), Ok(2), Ok(3)]);
    }

    #[test]
    fn of_several_that_fail_at_the_same_time_one_is_named_that_did() {
        for crew in CREWS {
            let mut entries: Vec<_> = (0..100).map(Ok).collect();
            let stopped = double(BatchMode::AllOrNothing, crew, &mut entries, no_undo).unwrap_err();
            assert_eq!((stopped.index % 10, stopped.error), (2, "it ends in two"));
        }
    }

    #[test]
    fn entries_are_divided_by_their_bytes_and_none_is_lost() {
        let weights = |weights: &mut [u64], bytes| -> Vec<(usize, Vec<u64>)> {
            let runs = divide(weights, bytes, |weight| *weight);
            runs.into_iter()
                .map(|(index, run)| (index, run.to_vec()))
                .collect()
        };
        let runs = weights(&mut [1, 1, 1, 1, 1], 2);
        assert_eq!(runs, [(0, vec![1, 1]), (2, vec![1, 1]), (4, vec![1])]);
        let runs = weights(&mut [0, 9, 0, 1], 5);
        assert_eq!(runs, [(0, vec![0, 9]), (2, vec![0, 1])]);
    }
}
