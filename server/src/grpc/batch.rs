//! Batches: parse entry by entry, one call into the core, answer entry by
//! entry.

use domain_core::batch::{BatchError, BatchMode, BatchResult};
use domaind_proto::convert::{Malformed, batch_mode};
use domaind_proto::v1::Refusal;

/// Copies above this many bytes make room for other calls first.
const LARGE_BYTES: u64 = 1 << 20;

/// Runs a batch of wire entries through the core.
///
/// # Errors
/// The refusal of the first entry that cannot be done, if the batch is all or
/// nothing.
pub(crate) fn run<W, S, T, E>(
    entries: &[W],
    partial: bool,
    parse: impl Fn(&W) -> Result<S, Malformed>,
    core: impl FnOnce(&[S], BatchMode) -> BatchResult<T, E>,
) -> Result<Vec<Result<T, Refusal>>, Refusal>
where
    Refusal: From<E>,
{
    let mode = batch_mode(entries.len(), partial)?;
    let parsed: Vec<_> = entries.iter().map(&parse).collect();
    let bad = parsed
        .iter()
        .position(Result::is_err)
        .filter(|_| mode == BatchMode::AllOrNothing);
    if let Some((index, Err(error))) = bad.map(|index| (index, &parsed[index])) {
        return Err(BatchError {
            index,
            error: error.clone(),
        }
        .into());
    }
    let (sound, refused): (Vec<_>, Vec<_>) = parsed
        .into_iter()
        .map(|entry| match entry {
            Ok(spec) => (Some(spec), None),
            Err(malformed) => (None, Some(malformed.into())),
        })
        .unzip();
    let specs: Vec<S> = sound.into_iter().flatten().collect();
    let mut answers = core(&specs, mode)?.into_iter();
    let answer = |refused: Option<Refusal>| match refused {
        Some(refusal) => Err(refusal),
        None => answers
            .next()
            .expect("the core answers every entry")
            .map_err(Refusal::from),
    };
    Ok(refused.into_iter().map(answer).collect())
}

/// Runs `work`, which copies so many bytes, on this thread; if they are many,
/// other calls get another thread meanwhile.
pub(crate) fn copying<R>(bytes: u64, work: impl FnOnce() -> R) -> R {
    yielding(bytes > LARGE_BYTES, work)
}

/// Runs `work` on this thread; if it is long, other calls get another thread
/// meanwhile.
pub(crate) fn yielding<R>(is_long: bool, work: impl FnOnce() -> R) -> R {
    let handle = tokio::runtime::Handle::current();
    let can_move = handle.runtime_flavor() == tokio::runtime::RuntimeFlavor::MultiThread;
    if is_long && can_move {
        tokio::task::block_in_place(work)
    } else {
        work()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use domain_core::limits::BATCH_ENTRIES;
    use domain_core::session::{Denied, SessionId};

    const BAD: Malformed = Malformed::UnknownDirection { value: 9 };

    fn parse(entry: &u64) -> Result<u64, Malformed> {
        if *entry == 9 { Err(BAD) } else { Ok(*entry) }
    }

    /// A core that refuses fives.
    fn core(specs: &[u64], mode: BatchMode) -> BatchResult<u64, Denied> {
        let denied = Denied::SessionEnded {
            session: SessionId::new(5),
        };
        let answers: Vec<_> = specs
            .iter()
            .map(|spec| {
                if *spec == 5 {
                    Err(denied)
                } else {
                    Ok(spec * 10)
                }
            })
            .collect();
        match answers
            .iter()
            .position(Result::is_err)
            .filter(|_| mode == BatchMode::AllOrNothing)
        {
            Some(index) => Err(BatchError {
                index,
                error: denied,
            }),
            None => Ok(answers),
        }
    }

    #[test]
    fn a_partial_batch_answers_in_the_order_of_the_request() {
        let answers = run(&[1, 9, 5, 2], true, parse, core).unwrap();
        let kinds: Vec<_> = answers
            .iter()
            .map(|answer| answer.as_ref().ok().copied())
            .collect();
        assert_eq!(kinds, [Some(10), None, None, Some(20)]);
    }

    #[test]
    fn an_all_or_nothing_batch_names_its_first_bad_entry_and_calls_nothing() {
        let untouched = |_: &[u64], _| -> BatchResult<u64, Denied> { panic!("called") };
        let refusal = run(&[1, 9], false, parse, untouched).unwrap_err();
        assert_eq!(refusal.metadata["entry_index"], "1");
        let refusal = run(&[1, 2, 5], false, parse, core).unwrap_err();
        assert_eq!(refusal.metadata["entry_index"], "2");
    }

    #[test]
    fn no_entries_and_too_many_are_refused() {
        assert!(run(&[], true, parse, core).is_err());
        assert!(run(&vec![1; BATCH_ENTRIES + 1], true, parse, core).is_err());
    }
}
