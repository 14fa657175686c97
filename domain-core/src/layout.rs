//! The address plan: where the apertures of a domain lie.

use crate::addr::{Granule, Iova, IovaRange};
use crate::region::Backing;

/// Default size of either aperture.
pub const DEFAULT_APERTURE_BYTES: u64 = 64 << 20;
/// Default last address of a domain.
pub const DEFAULT_IOVA_LIMIT: u64 = (1 << 48) - 1;
/// Pages of `hugetlb-2m` memory; a region is a whole number of them.
const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// What is asked of a new domain's address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayoutSpec {
    /// Size of the bounce aperture; 0 means none.
    pub bounce_bytes: u64,
    /// Size of the coherent aperture; 0 means none.
    pub coherent_bytes: u64,
    /// Last address, included.
    pub iova_limit: u64,
    /// First address of the apertures, a multiple of the granule.
    pub aperture_base: u64,
    /// Unit of allocation.
    pub granule: Granule,
    /// The memory behind the apertures.
    pub backing: Backing,
}

impl Default for LayoutSpec {
    fn default() -> LayoutSpec {
        LayoutSpec {
            bounce_bytes: DEFAULT_APERTURE_BYTES,
            coherent_bytes: DEFAULT_APERTURE_BYTES,
            iova_limit: DEFAULT_IOVA_LIMIT,
            aperture_base: 0,
            granule: Granule::default(),
            backing: Backing::Memfd,
        }
    }
}

/// Which of the two apertures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ApertureKind {
    /// Streaming mappings.
    Bounce,
    /// Coherent allocations.
    Coherent,
}

impl std::fmt::Display for ApertureKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            ApertureKind::Bounce => "bounce",
            ApertureKind::Coherent => "coherent",
        })
    }
}

/// A checked plan: sizes are rounded, apertures fit and follow one another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    granule: Granule,
    backing: Backing,
    limit: Iova,
    bounce: Option<IovaRange>,
    coherent: Option<IovaRange>,
}

/// Why a plan cannot be. Sizes are the rounded ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum LayoutError {
    #[error("aperture base {base} is not a multiple of the granule of {granule_bytes} bytes")]
    BaseMisaligned { base: Iova, granule_bytes: u64 },
    #[error(
        "the {aperture} aperture of {bytes} bytes is a single granule; it needs at least two of {granule_bytes} bytes"
    )]
    SingleGranule {
        aperture: ApertureKind,
        bytes: u64,
        granule_bytes: u64,
    },
    #[error("the {aperture} aperture of {bytes} bytes from {start} on leaves the 64-bit space")]
    Overflow {
        aperture: ApertureKind,
        start: Iova,
        bytes: u64,
    },
    #[error("the {aperture} aperture {range} ends past the iova limit {limit}")]
    PastLimit {
        aperture: ApertureKind,
        range: IovaRange,
        limit: Iova,
    },
}

impl LayoutSpec {
    /// Rounds the sizes up and places the apertures: bounce at the base,
    /// coherent directly above it.
    ///
    /// # Errors
    /// [`LayoutError`], naming the rounded numbers.
    pub fn plan(&self) -> Result<Layout, LayoutError> {
        let base = Iova::new(self.aperture_base);
        if self.granule.offset_in(self.aperture_base) != 0 {
            return Err(LayoutError::BaseMisaligned {
                base,
                granule_bytes: self.granule.bytes(),
            });
        }
        let bounce = self.place(ApertureKind::Bounce, Some(base), self.bounce_bytes)?;
        // `None` only when bounce ends at the very top of the space.
        let above = bounce.map_or(Some(base), |range| range.last().checked_add(1));
        let coherent = self.place(ApertureKind::Coherent, above, self.coherent_bytes)?;
        Ok(Layout {
            granule: self.granule,
            backing: self.backing,
            limit: Iova::new(self.iova_limit),
            bounce,
            coherent,
        })
    }

    fn place(
        &self,
        aperture: ApertureKind,
        start: Option<Iova>,
        asked_bytes: u64,
    ) -> Result<Option<IovaRange>, LayoutError> {
        if asked_bytes == 0 {
            return Ok(None);
        }
        let top = Iova::new(u64::MAX);
        let overflow = |bytes| LayoutError::Overflow {
            aperture,
            start: start.unwrap_or(top),
            bytes,
        };
        let bytes = asked_bytes
            .checked_next_multiple_of(self.unit())
            .ok_or(overflow(asked_bytes))?;
        if bytes == self.granule.bytes() {
            return Err(LayoutError::SingleGranule {
                aperture,
                bytes,
                granule_bytes: bytes,
            });
        }
        let start = start.ok_or(overflow(bytes))?;
        let range = IovaRange::from_len(start, bytes).map_err(|_| overflow(bytes))?;
        let limit = Iova::new(self.iova_limit);
        if range.last() > limit {
            return Err(LayoutError::PastLimit {
                aperture,
                range,
                limit,
            });
        }
        Ok(Some(range))
    }

    /// What sizes are rounded up to: the granule, or the page behind it.
    fn unit(&self) -> u64 {
        match self.backing {
            Backing::Memfd => self.granule.bytes(),
            Backing::Hugetlb2M => self.granule.bytes().max(HUGE_PAGE_BYTES),
        }
    }
}

impl Layout {
    /// Unit of allocation.
    #[must_use]
    pub fn granule(&self) -> Granule {
        self.granule
    }

    /// The memory behind the apertures.
    #[must_use]
    pub fn backing(&self) -> Backing {
        self.backing
    }

    /// Last address of the domain, included.
    #[must_use]
    pub fn limit(&self) -> Iova {
        self.limit
    }

    /// Where an aperture lies, if the domain has it.
    #[must_use]
    pub fn aperture(&self, kind: ApertureKind) -> Option<IovaRange> {
        match kind {
            ApertureKind::Bounce => self.bounce,
            ApertureKind::Coherent => self.coherent,
        }
    }

    /// Both apertures, which follow one another; `None` if the domain has neither.
    #[must_use]
    pub fn apertures(&self) -> Option<IovaRange> {
        let (first, last) = (
            self.bounce.or(self.coherent)?,
            self.coherent.or(self.bounce)?,
        );
        IovaRange::new(first.start(), last.last()).ok()
    }

    /// Memory that the plan needs, in bytes.
    #[must_use]
    pub fn region_bytes(&self) -> u64 {
        let bytes = |range: Option<IovaRange>| range.and_then(IovaRange::len_bytes).unwrap_or(0);
        bytes(self.bounce).saturating_add(bytes(self.coherent))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const P: u64 = 4096;

    fn spec(bounce_bytes: u64, coherent_bytes: u64) -> LayoutSpec {
        LayoutSpec {
            bounce_bytes,
            coherent_bytes,
            ..LayoutSpec::default()
        }
    }

    fn range(start: u64, len: u64) -> Option<IovaRange> {
        Some(IovaRange::from_len(Iova::new(start), len).unwrap())
    }

    #[test]
    fn sizes_are_rounded_up_and_coherent_lies_directly_above_bounce() {
        let plan = spec(P + 1, 3 * P - 1).plan().unwrap();
        assert_eq!(plan.aperture(ApertureKind::Bounce), range(0, 2 * P));
        assert_eq!(plan.aperture(ApertureKind::Coherent), range(2 * P, 3 * P));
        assert_eq!(plan.region_bytes(), 5 * P);
    }

    #[test]
    fn zero_means_no_aperture_and_the_other_takes_its_place() {
        let plan = LayoutSpec {
            aperture_base: 0x10_0000,
            ..spec(0, 2 * P)
        }
        .plan()
        .unwrap();
        assert_eq!(plan.aperture(ApertureKind::Bounce), None);
        assert_eq!(
            plan.aperture(ApertureKind::Coherent),
            range(0x10_0000, 2 * P)
        );
        assert_eq!(spec(0, 0).plan().unwrap().region_bytes(), 0);
    }

    #[test]
    fn an_aperture_of_one_granule_is_refused_even_if_less_was_asked() {
        let refused = spec(1, 0).plan().unwrap_err();
        assert_eq!(
            refused,
            LayoutError::SingleGranule {
                aperture: ApertureKind::Bounce,
                bytes: P,
                granule_bytes: P
            }
        );
        let refused = spec(0, P).plan().unwrap_err();
        assert!(matches!(
            refused,
            LayoutError::SingleGranule {
                aperture: ApertureKind::Coherent,
                ..
            }
        ));
    }

    #[test]
    fn a_base_off_the_granule_is_refused() {
        let off = LayoutSpec {
            aperture_base: P,
            granule: Granule::Size64K,
            ..LayoutSpec::default()
        };
        assert_eq!(
            off.plan(),
            Err(LayoutError::BaseMisaligned {
                base: Iova::new(P),
                granule_bytes: 65536
            })
        );
    }

    #[test]
    fn apertures_past_the_limit_are_refused_with_the_rounded_range() {
        // The limit cuts the last granule of the coherent aperture by one byte.
        let tight = LayoutSpec {
            iova_limit: 4 * P - 2,
            ..spec(2 * P, P + 1)
        };
        let hit = range(2 * P, 2 * P).unwrap();
        assert_eq!(
            tight.plan(),
            Err(LayoutError::PastLimit {
                aperture: ApertureKind::Coherent,
                range: hit,
                limit: Iova::new(4 * P - 2)
            })
        );
        assert!(
            LayoutSpec {
                iova_limit: 4 * P - 1,
                ..tight
            }
            .plan()
            .is_ok()
        );
    }

    #[test]
    fn sums_that_leave_64_bits_are_refused_not_wrapped() {
        let top = u64::MAX;
        let huge = LayoutSpec {
            iova_limit: top,
            ..spec(top, 0)
        };
        assert!(matches!(huge.plan(), Err(LayoutError::Overflow { bytes, .. }) if bytes == top));
        let high = LayoutSpec {
            iova_limit: top,
            aperture_base: top - P + 1,
            ..spec(2 * P, 0)
        };
        assert!(matches!(
            high.plan(),
            Err(LayoutError::Overflow {
                aperture: ApertureKind::Bounce,
                ..
            })
        ));
        // Bounce ends exactly at the top; nothing is left above it.
        let full = LayoutSpec {
            iova_limit: top,
            aperture_base: top - 2 * P + 1,
            ..spec(2 * P, 2 * P)
        };
        assert!(matches!(
            full.plan(),
            Err(LayoutError::Overflow {
                aperture: ApertureKind::Coherent,
                ..
            })
        ));
        assert!(
            LayoutSpec {
                coherent_bytes: 0,
                ..full
            }
            .plan()
            .is_ok()
        );
    }

    #[test]
    fn huge_pages_round_to_whole_pages_whatever_the_granule() {
        let huge = LayoutSpec {
            backing: Backing::Hugetlb2M,
            ..spec(P, 0)
        };
        assert_eq!(huge.plan().unwrap().region_bytes(), HUGE_PAGE_BYTES);
    }
}
