//! Sizes of holes, in 64 classes that are the bits of a word.
//!
//! Up to 15 granules each length is a class, above that there are eight to an
//! octave, as in TLSF (Masmano et al.), and the last class is all from 480
//! granules on.

/// Binary logarithm of the number of classes to an octave.
const FINE: u32 = 3;
const LAST: u32 = 63;

/// The class of a hole, as a bit. None for a length of 0.
pub(super) fn class_bit(len: u64) -> u64 {
    match len {
        0 => 0,
        _ => 1 << class_of(len),
    }
}

/// The classes whose every hole is long enough, as bits.
pub(super) fn roomy_classes(want: u64) -> u64 {
    let class = class_of(want);
    let lowest = class + u32::from(shortest(class) < want);
    u64::MAX.checked_shl(lowest).unwrap_or(0)
}

/// The shortest and the longest hole of a class.
pub(super) fn lens_of(class: u32) -> std::ops::RangeInclusive<u64> {
    let longest = match class {
        LAST => u64::MAX,
        _ => shortest(class + 1) - 1,
    };
    shortest(class)..=longest
}

fn class_of(len: u64) -> u32 {
    let octave = len.ilog2().max(FINE) - FINE;
    let step = u32::try_from((len >> octave).min(15)).unwrap_or(15);
    ((octave << FINE) + step - 1).min(LAST)
}

fn shortest(class: u32) -> u64 {
    let step = u64::from(class + 1);
    let octave = (class + 1) >> FINE;
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
        let mut class = 0;
        for len in 1..5_000 {
            let bit = class_bit(len);
            assert!(bit == 1 << class || bit == 1 << (class + 1), "{len}");
            class = bit.trailing_zeros();
            assert!(lens_of(class).contains(&len), "{len}");
            assert!(len > 15 || lens_of(class) == (len..=len), "{len}");
        }
        assert_eq!((class, lens_of(class)), (LAST, 480..=u64::MAX));
        assert_eq!(class_bit(u64::MAX), 1 << LAST);
    }

    #[test]
    fn what_is_roomy_holds_the_request_and_nothing_roomy_is_left_out() {
        for want in (1..2_000).chain([u64::MAX]) {
            let roomy = roomy_classes(want);
            for class in 0..=LAST {
                let fits = *lens_of(class).start() >= want;
                assert_eq!(roomy & (1 << class) != 0, fits, "{want} in {class}");
            }
        }
    }
}
