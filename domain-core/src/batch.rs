//! Requests of many entries: all of them, or each for itself.

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

/// Takes every entry that is still good one step further. An all-or-nothing
/// batch takes none behind the first that fails, and drops (and so undoes) the
/// others in reverse: what was taken first is given back last, and the corrected
/// request gets it again.
pub(crate) fn advance<T, U, E>(
    mode: BatchMode,
    entries: Vec<Result<T, E>>,
    mut step: impl FnMut(T) -> Result<U, E>,
) -> BatchResult<U, E> {
    let mut outcomes = Vec::with_capacity(entries.len());
    let mut entries = entries.into_iter().enumerate();
    while let Some((index, entry)) = entries.next() {
        match (mode, entry.and_then(&mut step)) {
            (BatchMode::AllOrNothing, Err(error)) => {
                entries.rev().for_each(drop);
                outcomes.into_iter().rev().for_each(drop);
                return Err(BatchError { index, error });
            }
            (_, outcome) => outcomes.push(outcome),
        }
    }
    Ok(outcomes)
}

/// Lets a partial batch pass; stops the other kind at its first refusal,
/// dropping (and so undoing) what the other entries had reached.
pub(crate) fn settle<T, E>(mode: BatchMode, outcomes: Vec<Result<T, E>>) -> BatchResult<T, E> {
    advance(mode, outcomes, Ok)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_refusal_stops_an_all_or_nothing_batch() {
        let stopped = settle(
            BatchMode::AllOrNothing,
            vec![Ok(1), Err("second"), Err("third")],
        )
        .unwrap_err();
        assert_eq!((stopped.index, stopped.error), (1, "second"));
        assert_eq!(
            settle(BatchMode::AllOrNothing, vec![Ok::<_, &str>(1)]).unwrap(),
            vec![Ok(1)]
        );
    }

    #[test]
    fn nothing_is_done_behind_the_first_failure_of_an_all_or_nothing_batch() {
        let mut seen = Vec::new();
        let step = |number: i32| {
            seen.push(number);
            if number == 2 { Err("no") } else { Ok(number) }
        };
        let stopped =
            advance(BatchMode::AllOrNothing, vec![Ok(1), Ok(2), Ok(3)], step).unwrap_err();
        assert_eq!((stopped.index, seen), (1, vec![1, 2]));
    }

    #[test]
    fn what_was_taken_first_is_given_back_last() {
        struct Taken<'a>(i32, &'a std::cell::RefCell<Vec<i32>>);
        impl Drop for Taken<'_> {
            fn drop(&mut self) {
                self.1.borrow_mut().push(self.0);
            }
        }
        let given_back = std::cell::RefCell::default();
        let taken = |number| Ok(Taken(number, &given_back));
        let batch = vec![taken(1), taken(2), Err("third"), taken(4), taken(5)];
        assert!(settle(BatchMode::AllOrNothing, batch).is_err());
        assert_eq!(given_back.into_inner(), [5, 4, 2, 1]);
    }

    #[test]
    fn a_partial_batch_keeps_every_answer() {
        let outcomes = vec![Ok(1), Err("second")];
        assert_eq!(
            settle(BatchMode::Partial, outcomes.clone()).unwrap(),
            outcomes
        );
    }
}
