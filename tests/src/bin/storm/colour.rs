//! Who writes which byte, and where.

use domaind_client::{Iova, IovaRange};
use domaind_tests::P;
use domaind_tests::node::POISON;

/// What a driver writes over its own memory when nobody can reach it any more.
pub(crate) const PRIVATE: u8 = 0xfe;
/// Pages that a driver maps directly, at most.
pub(crate) const PAGES: u64 = 64;
/// The direct mappings of a colour lie in a window of their own: who finds one
/// knows which bytes it must hold.
const WINDOW: u64 = PAGES * 2 * P;
/// Above the apertures.
const WINDOWS: u64 = 1 << 32;

/// The byte of one process. Neither zero nor one with another meaning; comes
/// again after more than 200 others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Colour(u8);

impl Colour {
    pub(crate) fn of_row(row: u64) -> Colour {
        let all = (1..=u8::MAX).filter(|byte| ![PRIVATE, POISON].contains(byte));
        let index = usize::try_from(row % 253).unwrap_or(0);
        Colour(all.clone().nth(index).unwrap_or(1))
    }

    pub(crate) fn byte(self) -> u8 {
        self.0
    }

    /// Where its direct mappings lie.
    pub(crate) fn window(self) -> IovaRange {
        let start = Iova::new(WINDOWS + u64::from(self.0) * WINDOW);
        IovaRange::from_len(start, WINDOW).expect("far below the end")
    }

    /// Whose window this is.
    pub(crate) fn at(iova: Iova) -> Option<u8> {
        u8::try_from(iova.get().checked_sub(WINDOWS)? / WINDOW).ok()
    }
}

/// All windows.
pub(crate) fn windows() -> IovaRange {
    IovaRange::from_len(Iova::new(WINDOWS), 256 * WINDOW).expect("far below the end")
}

/// The window that holds an address.
pub(crate) fn window_of(iova: Iova) -> IovaRange {
    let start = WINDOWS + (iova.get() - WINDOWS) / WINDOW * WINDOW;
    IovaRange::from_len(Iova::new(start), WINDOW).expect("far below the end")
}
