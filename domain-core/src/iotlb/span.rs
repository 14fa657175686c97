//! Runs of granules, and how they fall into the slots of nodes.

use super::format::{NODE_BITS, slot_index};
use crate::addr::{Granule, IovaRange};

/// Granules `first..=last`, counted from address 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) first: u64,
    pub(super) last: u64,
}

/// The part of a span that falls into one slot.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part {
    /// Which word of its node the slot is.
    pub(super) place: usize,
    /// The slot's number, counted from address 0 in slots of its height.
    pub(super) slot: u64,
    pub(super) span: Span,
    /// Does the span cover the whole slot?
    pub(super) whole: bool,
}

impl Span {
    /// All granules that `range` touches.
    pub(super) fn of(range: IovaRange, granule: Granule) -> Span {
        Span {
            first: range.start().get() >> granule.shift(),
            last: range.last().get() >> granule.shift(),
        }
    }

    /// How many granules.
    pub(super) fn granules(self) -> u64 {
        self.last - self.first + 1
    }

    /// The slots that it touches, of those that stand for `1 << shift` granules each.
    #[inline]
    pub(super) fn slots(self, shift: u32) -> impl Iterator<Item = Part> {
        (self.first >> shift..=self.last >> shift).map(move |slot| {
            // No sum overflows: granules have at least 12 bits less than addresses.
            let (low, high) = (slot << shift, ((slot + 1) << shift) - 1);
            let span = Span {
                first: self.first.max(low),
                last: self.last.min(high),
            };
            Part {
                place: slot_index(slot),
                slot,
                span,
                whole: span
                    == (Span {
                        first: low,
                        last: high,
                    }),
            }
        })
    }

    /// The height of the lowest node that could hold both spans: where they have the same prefix.
    pub(super) fn common_height(self, other: Span) -> u32 {
        let first = self.first;
        let differing = (first ^ self.last) | (first ^ other.first) | (first ^ other.last);
        let bits = u64::BITS - differing.leading_zeros();
        bits.div_ceil(NODE_BITS).max(1)
    }
}
