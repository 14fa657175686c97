//! What is entered in the IOTLB: ranges, and where they lead.

use std::fmt;

use crate::addr::{Iova, IovaRange};
use crate::layout::ApertureKind;
use crate::perm::Perm;

/// Names one memory of a domain in its page table: an aperture's, or one that a client has
/// registered.
///
/// Twenty bits, because that is the room it has in a leaf; never above [`RegionId::MOST`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RegionId(u32);

impl RegionId {
    /// The memory behind the bounce aperture.
    pub const BOUNCE: RegionId = RegionId(0);
    /// The memory behind the coherent aperture.
    pub const COHERENT: RegionId = RegionId(1);
    /// The largest number that a leaf can carry.
    pub const MOST: u32 = (1 << 20) - 1;
    /// How many slots there are for registered memory.
    pub const MEMORY_SLOTS: u32 = Self::MOST - 1;

    /// The registered memory in slot `slot`.
    ///
    /// # Panics
    /// If `slot` is not below [`RegionId::MEMORY_SLOTS`]: whoever hands out slots has a limit far
    /// below it.
    #[must_use]
    pub const fn memory_slot(slot: u32) -> RegionId {
        assert!(
            slot < Self::MEMORY_SLOTS,
            "slots are handed out up to a limit"
        );
        RegionId(slot + 2)
    }

    /// The slot of registered memory; `None` for an aperture.
    #[must_use]
    pub const fn slot(self) -> Option<u32> {
        self.0.checked_sub(2)
    }

    /// Its number in the page table.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }

    /// The region of this number; `None` above [`RegionId::MOST`].
    #[must_use]
    pub const fn from_number(number: u32) -> Option<RegionId> {
        if number > Self::MOST {
            return None;
        }
        Some(RegionId(number))
    }

    /// The low twenty bits of `bits`.
    #[allow(clippy::cast_possible_truncation)] // masked to twenty bits
    pub(super) const fn from_low_bits(bits: u64) -> RegionId {
        RegionId(bits as u32 & Self::MOST)
    }
}

impl From<ApertureKind> for RegionId {
    fn from(kind: ApertureKind) -> RegionId {
        match kind {
            ApertureKind::Bounce => RegionId::BOUNCE,
            ApertureKind::Coherent => RegionId::COHERENT,
        }
    }
}

impl fmt::Display for RegionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.slot() {
            None if *self == RegionId::BOUNCE => f.write_str("bounce"),
            None => f.write_str("coherent"),
            Some(slot) => write!(f, "memory slot {slot}"),
        }
    }
}

/// Where the bytes of a range are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// In which memory.
    pub region: RegionId,
    /// Where in it, in bytes.
    pub offset_bytes: u64,
}

/// One entry of the IOTLB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Exactly what is visible.
    pub range: IovaRange,
    /// Where it leads.
    pub target: Target,
    /// What the device side may do with it.
    pub perm: Perm,
}

/// Part of an entry that a translation needs, clipped to what was asked.
pub type Piece = Entry;

impl Entry {
    /// The part of it inside `window`, which starts inside it.
    pub(super) fn clip(&self, window: IovaRange) -> Piece {
        let last = self.range.last().min(window.last());
        let skipped = window
            .start()
            .offset_from(self.range.start())
            .expect("the window starts inside");
        Piece {
            range: IovaRange::new(window.start(), last).expect("the window starts inside"),
            target: Target {
                offset_bytes: self.target.offset_bytes + skipped,
                ..self.target
            },
            perm: self.perm,
        }
    }
}

/// The entry that is in the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{range} overlaps {hit}")]
pub struct Overlap {
    /// What was to be entered.
    pub range: IovaRange,
    /// What is there.
    pub hit: IovaRange,
}

/// Why a range has no translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum TranslateError {
    #[error("nothing is mapped at {at}")]
    Hole { at: Iova },
    #[error("{range} allows {perm}, not {want}")]
    Perm {
        range: IovaRange,
        perm: Perm,
        want: Perm,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn apertures_and_registered_memory_never_share_a_number() {
        assert_eq!(RegionId::from(ApertureKind::Bounce), RegionId::BOUNCE);
        assert_eq!(RegionId::from(ApertureKind::Coherent), RegionId::COHERENT);
        assert_eq!(RegionId::BOUNCE.slot(), None);
        assert_eq!(RegionId::COHERENT.slot(), None);
        for slot in [0, 1, RegionId::MEMORY_SLOTS - 1] {
            let region = RegionId::memory_slot(slot);
            assert_eq!(region.slot(), Some(slot));
            assert_eq!(RegionId::from_number(region.get()), Some(region));
        }
        assert_eq!(
            RegionId::memory_slot(RegionId::MEMORY_SLOTS - 1).get(),
            RegionId::MOST
        );
        assert_eq!(RegionId::from_number(RegionId::MOST + 1), None);
    }
}
