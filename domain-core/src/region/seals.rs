//! The seals of a memfd, as the kernel reports them.

use std::fmt;
use std::os::fd::BorrowedFd;

use rustix::fs::{SealFlags, fcntl_get_seals};
use rustix::io::Errno;

/// The seals that a memfd had when it was asked. Seals can be added later, never removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seals(SealFlags);

impl Seals {
    /// Asks the kernel. `EINVAL` or `EBADF` when the file is of a kind that has no seals.
    pub(super) fn of(fd: BorrowedFd<'_>) -> Result<Seals, Errno> {
        fcntl_get_seals(fd).map(Seals)
    }

    /// Whether the file keeps at least its present size for ever (`F_SEAL_SHRINK`).
    pub fn forbid_shrinking(self) -> bool {
        self.0.contains(SealFlags::SHRINK)
    }

    /// Whether new writers are shut out (`F_SEAL_WRITE` or `F_SEAL_FUTURE_WRITE`).
    pub fn forbid_writing(self) -> bool {
        self.0
            .intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE)
    }

    /// The kernel's `F_SEAL_*` bits.
    pub fn bits(self) -> u32 {
        self.0.bits()
    }
}

/// `shrink|grow|seal`, or `none`. Bits that this code does not know are printed in hexadecimal.
impl fmt::Display for Seals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const NAMES: [(SealFlags, &str); 6] = [
            (SealFlags::SHRINK, "shrink"),
            (SealFlags::GROW, "grow"),
            (SealFlags::WRITE, "write"),
            (SealFlags::FUTURE_WRITE, "future-write"),
            (SealFlags::EXEC, "exec"),
            (SealFlags::SEAL, "seal"),
        ];
        if self.0.is_empty() {
            return f.write_str("none");
        }
        let mut unnamed = self.0;
        let mut separator = "";
        for (flag, name) in NAMES {
            if unnamed.contains(flag) {
                write!(f, "{separator}{name}")?;
                separator = "|";
                unnamed.remove(flag);
            }
        }
        if unnamed.is_empty() {
            Ok(())
        } else {
            write!(f, "{separator}{:#x}", unnamed.bits())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seals_read_as_names_and_unknown_bits_in_hex() {
        assert_eq!(Seals(SealFlags::empty()).to_string(), "none");
        assert_eq!(
            Seals(SealFlags::SHRINK | SealFlags::SEAL).to_string(),
            "shrink|seal"
        );
        assert_eq!(
            Seals(SealFlags::GROW | SealFlags::from_bits_retain(0x8000)).to_string(),
            "grow|0x8000"
        );
    }

    #[test]
    fn either_write_seal_forbids_writing() {
        assert!(Seals(SealFlags::WRITE).forbid_writing());
        assert!(Seals(SealFlags::FUTURE_WRITE).forbid_writing());
        assert!(!Seals(SealFlags::SHRINK | SealFlags::GROW | SealFlags::EXEC).forbid_writing());
    }
}
