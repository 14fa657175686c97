//! The random numbers that everybody gets alike.

/// Where every sequence begins; printed with the results.
pub(crate) const SEED: u64 = 0x1DE5_0F10_7A5E_EDED;

/// SplitMix64: a nanosecond a number, the same on every machine.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    /// A sequence of its own for each `stream`.
    pub(crate) fn stream(stream: u64) -> Random {
        Random(SEED ^ stream.wrapping_mul(0xA24B_AED4_963E_E407))
    }

    pub(crate) fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`, which is not 0.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        let scaled = (u128::from(self.draw()) * u128::from(bound)) >> 64;
        u64::try_from(scaled).expect("it is below the bound")
    }

    /// A place in a list of `len` things, which is not empty.
    pub(crate) fn index(&mut self, len: usize) -> usize {
        let place = self.below(u64::try_from(len).expect("64 bits"));
        usize::try_from(place).expect("it is below the length")
    }

    /// Any order of a list.
    pub(crate) fn shuffle<T>(&mut self, list: &mut [T]) {
        for last in (1..list.len()).rev() {
            list.swap(last, self.index(last + 1));
        }
    }
}

/// Pages of a run of 4 KiB to 1 MiB: each power of two as often as the next,
/// and each length up to it and above the one before as often as the next.
pub(crate) fn run_of_pages(random: &mut Random) -> u32 {
    let most = 1 << random.below(9);
    let least = most / 2 + 1;
    u32::try_from(least + random.below(most - least + 1)).expect("at most 256")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_reach_from_one_page_to_a_mebibyte() {
        let mut random = Random::stream(0);
        let runs: Vec<u32> = (0..100_000).map(|_| run_of_pages(&mut random)).collect();
        assert_eq!(runs.iter().min(), Some(&1));
        assert_eq!(runs.iter().max(), Some(&256));
        assert!(runs.contains(&17) && runs.contains(&255));
    }

    #[test]
    fn the_same_stream_is_the_same_for_everybody() {
        let mut random = Random::stream(7);
        let mut again = Random::stream(7);
        assert!((0..100).all(|_| random.draw() == again.draw()));
        assert_ne!(Random::stream(8).draw(), Random::stream(7).draw());
    }
}
