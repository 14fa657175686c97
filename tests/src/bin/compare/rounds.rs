//! Who takes part in a row, and how they take turns.

use std::time::Duration;

use crate::clock::median;

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scale {
    /// Turns of everybody in one row.
    pub(crate) rounds: usize,
    /// Length of one turn. Short, so that few of them are cut in two by whoever
    /// else wants the core, and the median is none of those.
    pub(crate) turn: Duration,
    /// Who has not set up by then cannot take part.
    pub(crate) setup: Duration,
    /// Single operations of one turn, where percentiles are wanted.
    pub(crate) singles: u64,
    /// Turns of everybody, where percentiles are wanted.
    pub(crate) single_rounds: usize,
    /// Operations after which ageing would show.
    pub(crate) ageing_ops: u64,
    /// Times that a large table is replaced.
    pub(crate) replacements: usize,
}

impl Scale {
    pub(crate) const QUICK: Scale = Scale {
        rounds: 41,
        turn: Duration::from_millis(1),
        setup: Duration::from_millis(2_000),
        singles: 20_000,
        single_rounds: 13,
        ageing_ops: 1_000_000,
        replacements: 15,
    };

    pub(crate) const FULL: Scale = Scale {
        rounds: 101,
        turn: Duration::from_millis(2),
        setup: Duration::from_secs(5),
        singles: 100_000,
        single_rounds: 15,
        ageing_ops: 100_000_000,
        replacements: 31,
    };
}

/// What somebody is in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Ours,
    Peer,
    /// The least that the work can cost.
    Floor,
}

/// One turn: nanoseconds of one operation.
pub(crate) type Turn<'a> = Box<dyn FnMut() -> f64 + 'a>;

/// Somebody who takes part in a row, or the reason why not.
pub(crate) struct Contender<'a> {
    name: &'static str,
    role: Role,
    turn: Result<Turn<'a>, String>,
}

impl<'a> Contender<'a> {
    pub(crate) fn new(
        role: Role,
        name: &'static str,
        turn: impl FnMut() -> f64 + 'a,
    ) -> Contender<'a> {
        Contender {
            name,
            role,
            turn: Ok(Box::new(turn)),
        }
    }

    pub(crate) fn unable(role: Role, name: &'static str, why: String) -> Contender<'a> {
        Contender {
            name,
            role,
            turn: Err(why),
        }
    }
}

/// What somebody reached in a row.
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    pub(crate) name: &'static str,
    pub(crate) role: Role,
    /// `None`: could not do it, and the note says why.
    pub(crate) value: Option<f64>,
    pub(crate) note: Option<String>,
}

/// Lets everybody have their turns; each outcome is the median of them.
pub(crate) fn interleave(rounds: usize, mut contenders: Vec<Contender<'_>>) -> Vec<Outcome> {
    let mut results = vec![Vec::new(); contenders.len()];
    for at in turns(rounds, contenders.len()) {
        if let Ok(turn) = &mut contenders[at].turn {
            results[at].push(turn());
        }
    }
    let outcome = |(contender, results): (Contender<'_>, _)| Outcome {
        name: contender.name,
        role: contender.role,
        value: median(results),
        note: contender.turn.err(),
    };
    contenders.into_iter().zip(results).map(outcome).collect()
}

/// Whose turn it is: everybody once a round, each round begun by the next one.
pub(crate) fn turns(rounds: usize, many: usize) -> impl Iterator<Item = usize> {
    (0..rounds).flat_map(move |round| (0..many).map(move |step| (round + step) % many))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everybody_has_one_turn_a_round_and_the_first_changes() {
        let order: Vec<usize> = turns(3, 3).collect();
        assert_eq!(order, [0, 1, 2, 1, 2, 0, 2, 0, 1]);
    }

    #[test]
    fn who_cannot_take_part_has_no_value_but_a_reason() {
        let contenders = vec![
            Contender::new(Role::Ours, "ours", || 2.0),
            Contender::unable(Role::Peer, "peer", "too slow".into()),
        ];
        let outcomes = interleave(3, contenders);
        assert_eq!(outcomes[0].value, Some(2.0));
        assert_eq!(outcomes[1].value, None);
        assert_eq!(outcomes[1].note.as_deref(), Some("too slow"));
    }
}
