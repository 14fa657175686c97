//! Sizes of holes, in 64 classes, so that a set of them is a word.
//!
//! Up to 15 granules each length is a class, above that there are eight to an
//! octave, as in TLSF (Masmano et al.), and the last class is all from 1,024
//! granules on.

/// Binary logarithm of the number of classes to an octave.
const FINE: u32 = 3;
const LAST: u8 = 63;

/// The class of a hole.
pub(super) fn class_of(len: u64) -> u8 {
    if len >= shortest(LAST) {
        return LAST;
    }
    let octave = len.ilog2().max(FINE) - FINE;
    let class = u64::from(octave << FINE) + (len >> octave) - 1;
    u8::try_from(class).unwrap_or(LAST)
}

/// The classes whose every hole is long enough, as bits.
pub(super) fn roomy_classes(want: u64) -> u64 {
    let class = class_of(want);
    let lowest = u32::from(class) + u32::from(shortest(class) < want);
    u64::MAX.checked_shl(lowest).unwrap_or(0)
}

/// The shortest hole of a class.
fn shortest(class: u8) -> u64 {
    let step = u64::from(class) + 1;
    let octave = step >> FINE;
    if octave <= 1 {
        return step;
    }
    (step % (1 << FINE) + (1 << FINE)) << (octave - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_follow_each_other_without_gap_and_short_ones_are_exact() {
        for len in 1..5_000 {
            let class = class_of(len);
            assert!(shortest(class) <= len, "{len}");
            assert!(class == LAST || len < shortest(class + 1), "{len}");
            assert!(len > 15 || u64::from(class) == len - 1, "{len}");
        }
        assert_eq!((shortest(LAST), class_of(u64::MAX)), (1024, LAST));
    }

    #[test]
    fn what_is_roomy_holds_the_request_and_nothing_roomy_is_left_out() {
        for want in (1..2_000).chain([u64::MAX]) {
            let roomy = roomy_classes(want);
            for class in 0..=LAST {
                let fits = shortest(class) >= want;
                assert_eq!(roomy & (1 << class) != 0, fits, "{want} in {class}");
            }
        }
    }
}
