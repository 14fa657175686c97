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

/// The entry for which a whole batch was refused. Nothing was changed.
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

/// Lets a partial batch pass; stops the other kind at its first refusal,
/// dropping (and so undoing) what the other entries had reached.
pub(crate) fn settle<T, E>(mode: BatchMode, outcomes: Vec<Result<T, E>>) -> BatchResult<T, E> {
    let refused = match mode {
        BatchMode::Partial => None,
        BatchMode::AllOrNothing => outcomes.iter().position(Result::is_err),
    };
    let Some(index) = refused else {
        return Ok(outcomes);
    };
    match outcomes.into_iter().nth(index) {
        Some(Err(error)) => Err(BatchError { index, error }),
        _ => unreachable!("position() found an error at {index}"),
    }
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
    fn a_partial_batch_keeps_every_answer() {
        let outcomes = vec![Ok(1), Err("second")];
        assert_eq!(
            settle(BatchMode::Partial, outcomes.clone()).unwrap(),
            outcomes
        );
    }
}
