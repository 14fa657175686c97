//! Lengths of slots.
//!
//! Up to a page a slot lies in one page; longer ones are whole pages, in four steps from one power
//! of two to the next. So at most a fifth of a long slot is slack, which has to be zeroed at map.

/// Bytes of a page: what a slot never crosses, or begins on.
pub(super) const PAGE_BYTES: usize = 4096;
/// Slots begin at multiples of this.
pub(super) const UNIT_BYTES: usize = 256;
/// How many classes there are.
pub(super) const CLASSES: usize = SMALL.len() + PAGES.len();
/// The longest slot of a class. What is longer takes so long to copy that a lock is nothing, and is
/// taken from a lease as it is, in whole pages.
pub(super) const LONGEST_BYTES: usize = PAGES[PAGES.len() - 1] * PAGE_BYTES;

/// Five of 768 and three of 1280 bytes fill a page as well as powers of two do; of 1536 no more go
/// into one than of 2048.
const SMALL: [usize; 7] = [256, 512, 768, 1024, 1280, 2048, 4096];
const PAGES: [usize; 15] = [2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32];

const SLOT_BYTES: [usize; CLASSES] = slot_bytes();
/// The class of lengths up to a page, by the unit in which their last byte lies.
const BY_UNITS: [u8; PAGE_BYTES / UNIT_BYTES] = by(UNIT_BYTES);
/// The class of longer ones, by the page in which their last byte lies.
const BY_PAGES: [u8; LONGEST_BYTES / PAGE_BYTES] = by(PAGE_BYTES);

/// A length of slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Class(u8);

impl Class {
    /// The shortest that holds so many bytes; `None` if none does, and for nothing.
    #[inline]
    pub(super) fn of(len: usize) -> Option<Class> {
        let last = len.checked_sub(1)?;
        // Both units are constants here, so that nothing is divided.
        match last < PAGE_BYTES {
            true => BY_UNITS.get(last / UNIT_BYTES),
            false => BY_PAGES.get(last / PAGE_BYTES),
        }
        .copied()
        .map(Class)
    }

    /// Bytes that a buffer of this length takes.
    #[inline]
    pub(super) fn room_bytes(len: usize) -> usize {
        match Class::of(len) {
            Some(class) => class.slot_bytes(),
            None => len.next_multiple_of(PAGE_BYTES),
        }
    }

    /// The class of this number, if there are so many.
    #[inline]
    pub(super) fn numbered(index: usize) -> Option<Class> {
        let number = u8::try_from(index).ok();
        number.filter(|_| index < CLASSES).map(Class)
    }

    pub(super) fn all() -> impl Iterator<Item = Class> {
        (0..).take(CLASSES).map(Class)
    }

    #[inline]
    pub(super) fn index(self) -> usize {
        usize::from(self.0)
    }

    #[inline]
    pub(super) fn slot_bytes(self) -> usize {
        slot_bytes_of(self.index())
    }

    /// Pages from one group of slots to the next.
    pub(super) fn stride_pages(self) -> usize {
        self.slot_bytes().div_ceil(PAGE_BYTES)
    }

    /// Slots of a group: those of a page, or one.
    pub(super) fn group_slots(self) -> usize {
        (PAGE_BYTES / self.slot_bytes()).max(1)
    }

    /// Where a slot lies, in units behind the first of its span.
    pub(super) fn slot_units(self, slot: usize) -> usize {
        let (group, inside) = (slot / self.group_slots(), slot % self.group_slots());
        let bytes = group * self.stride_pages() * PAGE_BYTES + inside * self.slot_bytes();
        bytes / UNIT_BYTES
    }

    /// Which slot lies so many units behind the first of its span.
    pub(super) fn slot_at(self, units: usize) -> usize {
        let bytes = units * UNIT_BYTES;
        let stride = self.stride_pages() * PAGE_BYTES;
        bytes / stride * self.group_slots() + bytes % stride / self.slot_bytes()
    }
}

/// Bytes of a slot of the class with this number.
pub(super) const fn slot_bytes_of(index: usize) -> usize {
    SLOT_BYTES[index]
}

const fn slot_bytes() -> [usize; CLASSES] {
    let mut all = [0; CLASSES];
    let mut index = 0;
    while index < CLASSES {
        all[index] = if index < SMALL.len() {
            SMALL[index]
        } else {
            PAGES[index - SMALL.len()] * PAGE_BYTES
        };
        index += 1;
    }
    all
}

/// The classes of lengths whose last byte lies in the first unit, the second one, and so on.
const fn by<const N: usize>(unit: usize) -> [u8; N] {
    let mut table = [0; N];
    let mut class = 0;
    let mut index = 0;
    while index < N {
        while SLOT_BYTES[class as usize] < (index + 1) * unit {
            class += 1;
        }
        table[index] = class;
        index += 1;
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_length_goes_into_the_shortest_slot_that_holds_it() {
        for len in (1..=LONGEST_BYTES).filter(|len| len % 61 == 0 || len % 256 < 2) {
            let class = Class::of(len).unwrap();
            assert!(class.slot_bytes() >= len, "{len}");
            let shorter = Class::all().filter(|other| other.slot_bytes() < class.slot_bytes());
            assert!(
                shorter.into_iter().all(|other| other.slot_bytes() < len),
                "{len}"
            );
        }
        assert_eq!(Class::of(LONGEST_BYTES + 1), None);
        assert_eq!(Class::of(0), None);
    }

    #[test]
    fn little_of_a_long_slot_is_slack() {
        for len in (PAGE_BYTES + 1..=LONGEST_BYTES).step_by(97) {
            let slack = Class::of(len).unwrap().slot_bytes() - len;
            assert!(slack < len / 4 + PAGE_BYTES, "{slack} of {len}");
        }
    }

    #[test]
    fn slots_begin_on_units_lie_apart_and_cross_no_page_unless_they_begin_on_one() {
        for class in Class::all() {
            for slot in 0..64 {
                let start = class.slot_units(slot) * UNIT_BYTES;
                let next = class.slot_units(slot + 1) * UNIT_BYTES;
                let bytes = class.slot_bytes();
                assert!(next - start >= bytes, "{class:?} {slot}");
                assert_eq!(class.slot_at(start / UNIT_BYTES), slot);
                let in_page = start % PAGE_BYTES;
                assert!(
                    in_page == 0 || in_page + bytes <= PAGE_BYTES,
                    "{class:?} {slot}"
                );
            }
        }
    }
}
