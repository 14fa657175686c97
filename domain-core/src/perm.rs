//! Direction and permission.

use std::fmt;

/// Which way the bytes of a streaming mapping are copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// In at map; the device reads.
    ToDevice,
    /// Back at unmap; the device writes.
    FromDevice,
    /// In at map and back at unmap.
    Bidirectional,
}

impl Direction {
    /// What the device side may do with such a mapping.
    #[must_use]
    pub const fn perm(self) -> Perm {
        match self {
            Direction::ToDevice => Perm::Read,
            Direction::FromDevice => Perm::Write,
            Direction::Bidirectional => Perm::ReadWrite,
        }
    }

    /// Do the driver's bytes travel to the device?
    #[must_use]
    pub const fn copies_in(self) -> bool {
        matches!(self, Direction::ToDevice | Direction::Bidirectional)
    }

    /// Do the device's bytes travel back?
    #[must_use]
    pub const fn copies_back(self) -> bool {
        matches!(self, Direction::FromDevice | Direction::Bidirectional)
    }
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Direction::ToDevice => "TO_DEVICE",
            Direction::FromDevice => "FROM_DEVICE",
            Direction::Bidirectional => "BIDIRECTIONAL",
        })
    }
}

/// What the device side may do with a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Perm {
    /// Loads.
    Read,
    /// Stores.
    Write,
    /// Both.
    ReadWrite,
}

impl Perm {
    /// Is everything that `want` needs allowed?
    #[must_use]
    pub const fn allows(self, want: Perm) -> bool {
        matches!(
            (self, want),
            (Perm::ReadWrite, _) | (Perm::Read, Perm::Read) | (Perm::Write, Perm::Write)
        )
    }
}

impl fmt::Display for Perm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Perm::Read => "READ",
            Perm::Write => "WRITE",
            Perm::ReadWrite => "READ_WRITE",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_direction_gives_the_device_no_more_than_it_needs() {
        assert_eq!(Direction::ToDevice.perm(), Perm::Read);
        assert_eq!(Direction::FromDevice.perm(), Perm::Write);
        assert!(Direction::Bidirectional.perm().allows(Perm::ReadWrite));
    }

    #[test]
    fn one_way_never_allows_the_other() {
        assert!(!Perm::Read.allows(Perm::Write) && !Perm::Read.allows(Perm::ReadWrite));
        assert!(!Perm::Write.allows(Perm::Read) && !Perm::Write.allows(Perm::ReadWrite));
        assert!(Perm::ReadWrite.allows(Perm::Read) && Perm::ReadWrite.allows(Perm::Write));
    }
}
