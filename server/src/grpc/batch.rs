//! Batches: parse entry by entry, one call into the core, answer entry by
//! entry.

use domain_core::batch::{BatchError, BatchMode, BatchResult};
use domaind_proto::convert::{Malformed, batch_mode};
use domaind_proto::v1::Refusal;

/// Runs a batch of wire entries through the core, and answers each in its place.
///
/// # Errors
/// The refusal of the first entry that cannot be done, if the batch is all or
/// nothing.
pub(crate) fn run<W, S, T, E>(
    entries: &[W],
    partial: bool,
    parse: impl Fn(&W) -> Result<S, Malformed>,
    core: impl FnOnce(&[S], BatchMode) -> BatchResult<T, E>,
) -> Result<impl Iterator<Item = Result<T, Refusal>>, Refusal>
where
    Refusal: From<E>,
{
    let mode = batch_mode(entries.len(), partial)?;
    let mut specs = Vec::with_capacity(entries.len());
    // Which could not be read, in their order.
    let mut refused: Vec<(usize, Refusal)> = Vec::new();
    for (index, entry) in entries.iter().enumerate() {
        match (parse(entry), mode) {
            (Ok(spec), _) => specs.push(spec),
            (Err(error), BatchMode::AllOrNothing) => return Err(BatchError { index, error }.into()),
            (Err(error), BatchMode::Partial) => refused.push((index, error.into())),
        }
    }
    let mut answers = core(&specs, mode)?.into_iter();
    let mut refused = refused.into_iter().peekable();
    let answer = move |index| match refused.next_if(|(at, _)| *at == index) {
        Some((_, refusal)) => Err(refusal),
        None => answers
            .next()
            .expect("the core answers every entry")
            .map_err(Refusal::from),
    };
    Ok((0..entries.len()).map(answer))
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
        let kinds: Vec<_> = answers.map(Result::ok).collect();
        assert_eq!(kinds, [Some(10), None, None, Some(20)]);
    }

    #[test]
    fn an_all_or_nothing_batch_names_its_first_bad_entry_and_calls_nothing() {
        let untouched = |_: &[u64], _| -> BatchResult<u64, Denied> { panic!("called") };
        let refusal = run(&[1, 9], false, parse, untouched).err().unwrap();
        assert_eq!(refusal.metadata["entry_index"], "1");
        let refusal = run(&[1, 2, 5], false, parse, core).err().unwrap();
        assert_eq!(refusal.metadata["entry_index"], "2");
    }

    #[test]
    fn no_entries_and_too_many_are_refused() {
        assert!(run(&[], true, parse, core).is_err());
        assert!(run(&vec![1; BATCH_ENTRIES + 1], true, parse, core).is_err());
    }
}
