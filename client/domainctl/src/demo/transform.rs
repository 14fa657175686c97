//! What devices do to blocks: XOR with a stream that depends on the device,
//! the block and the place in it, so that a byte at the wrong place or from
//! the wrong device is seen.

/// Bytes that are transformed at a time; a multiple of a word.
pub(crate) const CHUNK_BYTES: usize = 64 << 10;
const WORD_BYTES: usize = 8;

/// The key of one block in one device's hands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Key(u64);

impl Key {
    pub(crate) fn of(device: u64, block: u64) -> Key {
        Key(mix(mix(device.wrapping_add(1)) ^ block))
    }

    /// XORs `bytes`, which begin `offset` bytes into the block; `offset` is a
    /// multiple of a word. Twice is as if never.
    pub(crate) fn apply(self, offset: usize, bytes: &mut [u8]) {
        assert_eq!(offset % WORD_BYTES, 0, "chunks begin at whole words");
        for (number, word) in bytes.chunks_mut(WORD_BYTES).enumerate() {
            let place = (offset / WORD_BYTES + number) as u64;
            let stream = mix(self.0.wrapping_add(place)).to_le_bytes();
            word.iter_mut()
                .zip(stream)
                .for_each(|(byte, key)| *byte ^= key);
        }
    }
}

/// The finaliser of splitmix64 (Steele, Lea, Flood: Fast Splittable
/// Pseudorandom Number Generators, OOPSLA 2014).
fn mix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn twice_is_as_if_never_whatever_the_length() {
        for len in [0, 1, 7, 8, 9, 4097] {
            let original: Vec<u8> = (0..=250).cycle().take(len).collect();
            let mut bytes = original.clone();
            Key::of(1, 2).apply(0, &mut bytes);
            assert_eq!(bytes == original, len == 0);
            Key::of(1, 2).apply(0, &mut bytes);
            assert_eq!(bytes, original);
        }
    }

    #[test]
    fn chunks_make_the_same_as_the_whole() {
        let mut whole = vec![0; 4096 + 3];
        let mut parts = whole.clone();
        Key::of(0, 9).apply(0, &mut whole);
        for (number, part) in parts.chunks_mut(64).enumerate() {
            Key::of(0, 9).apply(number * 64, part);
        }
        assert_eq!(whole, parts);
    }

    #[test]
    fn another_device_block_or_place_makes_other_bytes() {
        let stream = |device, block, offset| {
            let mut bytes = [0; 64];
            Key::of(device, block).apply(offset, &mut bytes);
            bytes
        };
        let base = stream(0, 0, 0);
        assert!(base != stream(1, 0, 0) && base != stream(0, 1, 0) && base != stream(0, 0, 64));
    }
}
