//! Addresses, inclusive ranges, granules.

use std::fmt;

/// An address in one domain's I/O address space, in bytes.
///
/// Not a host pointer, and meaningless in another domain. Zero is never
/// allocated: a space that starts at 0 keeps its first granule back, so that
/// 0 is never a valid answer.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Iova(u64);

impl Iova {
    /// The address `bytes` above 0.
    #[must_use]
    pub const fn new(bytes: u64) -> Iova {
        Iova(bytes)
    }

    /// The address as a number of bytes.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// `None` when the sum leaves the 64-bit space.
    #[must_use]
    pub fn checked_add(self, bytes: u64) -> Option<Iova> {
        self.0.checked_add(bytes).map(Iova)
    }

    /// Bytes from `origin` up to here; `None` below it.
    #[must_use]
    pub fn offset_from(self, origin: Iova) -> Option<u64> {
        self.0.checked_sub(origin.0)
    }
}

impl fmt::Display for Iova {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Debug for Iova {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Addresses `start..=last`. Never empty, and it may end at 2^64-1, which is
/// why it holds no length.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IovaRange {
    start: Iova,
    /// Never below `start`.
    last: Iova,
}

/// Why two numbers are not a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum RangeError {
    #[error("a range of zero bytes at {start}")]
    ZeroLength { start: Iova },
    #[error("a range that ends at {last}, below its start {start}")]
    Backwards { start: Iova, last: Iova },
    #[error("{len_bytes} bytes from {start} on leave the 64-bit space")]
    Overflow { start: Iova, len_bytes: u64 },
}

impl IovaRange {
    /// `start..=last`.
    ///
    /// # Errors
    /// [`RangeError::Backwards`] if `last` lies below `start`.
    pub fn new(start: Iova, last: Iova) -> Result<IovaRange, RangeError> {
        if last < start {
            return Err(RangeError::Backwards { start, last });
        }
        Ok(IovaRange { start, last })
    }

    /// `len_bytes` bytes from `start` on.
    ///
    /// # Errors
    /// [`RangeError::ZeroLength`], or [`RangeError::Overflow`] if the last
    /// byte would lie past 2^64-1.
    pub fn from_len(start: Iova, len_bytes: u64) -> Result<IovaRange, RangeError> {
        let span = len_bytes
            .checked_sub(1)
            .ok_or(RangeError::ZeroLength { start })?;
        let last = start
            .checked_add(span)
            .ok_or(RangeError::Overflow { start, len_bytes })?;
        Ok(IovaRange { start, last })
    }

    /// First address.
    #[must_use]
    pub const fn start(self) -> Iova {
        self.start
    }

    /// Last address that still belongs to the range.
    #[must_use]
    pub const fn last(self) -> Iova {
        self.last
    }

    /// Length in bytes; 2^64 for the whole space, hence 128 bits.
    #[must_use]
    pub fn bytes(self) -> u128 {
        u128::from(self.last.0 - self.start.0) + 1
    }

    /// Length in bytes, `None` for the whole 64-bit space.
    #[must_use]
    pub fn len_bytes(self) -> Option<u64> {
        (self.last.0 - self.start.0).checked_add(1)
    }

    /// Do the two share an address? Touching is not overlapping.
    #[must_use]
    pub fn overlaps(self, other: IovaRange) -> bool {
        self.start <= other.last && other.start <= self.last
    }

    /// Does all of `other` lie inside?
    #[must_use]
    pub fn contains(self, other: IovaRange) -> bool {
        self.start <= other.start && other.last <= self.last
    }
}

impl fmt::Display for IovaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}, {}]", self.start, self.last)
    }
}

impl fmt::Debug for IovaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The unit in which iovas are allocated and memory changes hands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Granule {
    /// 4 KiB.
    #[default]
    Size4K,
    /// 64 KiB.
    Size64K,
    /// 2 MiB.
    Size2M,
}

impl Granule {
    /// The granule of so many bytes, if there is one.
    #[must_use]
    pub fn from_bytes(bytes: u64) -> Option<Granule> {
        [Granule::Size4K, Granule::Size64K, Granule::Size2M]
            .into_iter()
            .find(|granule| granule.bytes() == bytes)
    }

    /// Its size in bytes, a power of two.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        1 << self.shift()
    }

    /// Binary logarithm of its size.
    #[must_use]
    pub const fn shift(self) -> u32 {
        match self {
            Granule::Size4K => 12,
            Granule::Size64K => 16,
            Granule::Size2M => 21,
        }
    }

    /// Bytes from the start of the granule that `bytes` lies in.
    #[must_use]
    pub const fn offset_in(self, bytes: u64) -> u64 {
        bytes & (self.bytes() - 1)
    }

    /// The next multiple that is not below `bytes`; `None` past 2^64-1.
    #[must_use]
    pub fn round_up(self, bytes: u64) -> Option<u64> {
        bytes.checked_next_multiple_of(self.bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOP: Iova = Iova::new(u64::MAX);

    #[test]
    fn a_range_may_end_at_the_very_top_and_still_has_a_length() {
        let whole = IovaRange::new(Iova::new(0), TOP).unwrap();
        assert_eq!(whole.bytes(), 1 << 64);
        assert_eq!(whole.len_bytes(), None);
        assert_eq!(IovaRange::from_len(TOP, 1).unwrap().last(), TOP);
    }

    #[test]
    fn a_range_that_leaves_64_bits_or_is_empty_is_refused_with_its_numbers() {
        assert_eq!(
            IovaRange::from_len(TOP, 2),
            Err(RangeError::Overflow {
                start: TOP,
                len_bytes: 2
            })
        );
        assert_eq!(
            IovaRange::from_len(TOP, 0),
            Err(RangeError::ZeroLength { start: TOP })
        );
        let (start, last) = (Iova::new(5), Iova::new(4));
        assert_eq!(
            IovaRange::new(start, last),
            Err(RangeError::Backwards { start, last })
        );
    }

    #[test]
    fn touching_is_not_overlapping() {
        let low = IovaRange::from_len(Iova::new(0x1000), 0x1000).unwrap();
        let next = IovaRange::from_len(Iova::new(0x2000), 1).unwrap();
        let inside = IovaRange::from_len(Iova::new(0x1fff), 1).unwrap();
        assert!(!low.overlaps(next) && !next.overlaps(low));
        assert!(low.overlaps(inside) && inside.overlaps(low));
        assert!(low.contains(inside) && !inside.contains(low));
    }

    #[test]
    fn rounding_up_says_when_it_cannot() {
        assert_eq!(Granule::Size4K.round_up(1), Some(4096));
        assert_eq!(Granule::Size4K.round_up(4096), Some(4096));
        assert_eq!(Granule::Size2M.round_up(u64::MAX), None);
        assert_eq!(Granule::from_bytes(65536), Some(Granule::Size64K));
        assert_eq!(Granule::from_bytes(8192), None);
    }
}
