//! A domain's memory in this process: each aperture is one run of addresses.

use std::os::fd::{AsFd, OwnedFd};

use domain_core::addr::{Iova, IovaRange};
use domain_core::iotlb::{RegionId, Target};
use domain_core::region::{
    Access, AccessError, MapError, SharedMemory, SharedSlice, SharedU32, SharedU32Mut, SharedU64,
    SharedU64Mut,
};

use crate::error::Error;

/// What hugetlb memory must be aligned to.
pub(crate) const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// Why an address could not be accessed. Nothing was read or written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum AddressError {
    #[error("{iova} lies in no aperture of the domain")]
    NoAperture { iova: Iova },
    #[error("{len} bytes at {iova} reach {behind} bytes into an aperture, where no memory is")]
    NotBacked { iova: Iova, len: u64, behind: u64 },
    #[error("the session is attached read-only, and {len} bytes at {iova} were to be written")]
    ReadOnly { iova: Iova, len: u64 },
    #[error("a word at {iova}, which is not a multiple of {align}")]
    Misaligned { iova: Iova, align: u64 },
    #[error("the session has ended, and {len} bytes at {iova} were to be written")]
    Ended { iova: Iova, len: u64 },
}

impl AddressError {
    fn new(iova: Iova, error: AccessError) -> AddressError {
        match error {
            AccessError::OutOfBounds {
                len, unmapped_at, ..
            } => AddressError::NotBacked {
                iova,
                len,
                behind: unmapped_at,
            },
            AccessError::ReadOnly { len, .. } => AddressError::ReadOnly { iova, len },
            AccessError::Misaligned { align, .. } => AddressError::Misaligned { iova, align },
        }
    }
}

/// One region as it came from the daemon.
#[derive(Debug)]
pub(crate) struct RegionGrant {
    /// Inside its aperture.
    pub(crate) range: IovaRange,
    pub(crate) hugetlb: bool,
    pub(crate) fd: OwnedFd,
}

/// One aperture. Its addresses are reserved whole and stay where they are;
/// what no region backs is inaccessible.
#[derive(Debug)]
pub(crate) struct Aperture {
    range: IovaRange,
    memory: SharedMemory,
}

impl Aperture {
    /// Reserves `len_bytes` of addresses, the length of `range`, and maps
    /// every region at its place. The fds are closed.
    pub(crate) fn map(
        range: IovaRange,
        len_bytes: u64,
        regions: Vec<RegionGrant>,
        access: Access,
    ) -> Result<Aperture, Error> {
        let failed = |range| move |cause| Error::Region { range, cause };
        let mut memory =
            SharedMemory::reserve(len_bytes, alignment(&regions)).map_err(failed(range))?;
        for region in regions {
            place(&mut memory, range, &region, access).map_err(failed(region.range))?;
        }
        Ok(Aperture { range, memory })
    }
}

/// What the reservation must be aligned to.
fn alignment(regions: &[RegionGrant]) -> u64 {
    if regions.iter().any(|region| region.hugetlb) {
        HUGE_PAGE_BYTES
    } else {
        page_bytes()
    }
}

/// The smallest unit that can be mapped.
pub(crate) fn page_bytes() -> u64 {
    u64::try_from(rustix::param::page_size()).unwrap_or(HUGE_PAGE_BYTES)
}

fn place(
    memory: &mut SharedMemory,
    aperture: IovaRange,
    region: &RegionGrant,
    access: Access,
) -> Result<(), MapError> {
    let inside = "a region lies in its aperture, which has a length";
    let offset = region.range.start().offset_from(aperture.start());
    let len_bytes = region.range.len_bytes();
    memory.map_at(
        offset.expect(inside),
        len_bytes.expect(inside),
        region.fd.as_fd(),
        access,
    )
}

/// Both apertures: from an iova to memory, by subtraction.
#[derive(Debug)]
pub(crate) struct Apertures {
    pub(crate) bounce: Option<Aperture>,
    pub(crate) coherent: Option<Aperture>,
}

impl Apertures {
    pub(crate) fn bounce_range(&self) -> Option<IovaRange> {
        self.bounce.as_ref().map(|aperture| aperture.range)
    }

    pub(crate) fn coherent_range(&self) -> Option<IovaRange> {
        self.coherent.as_ref().map(|aperture| aperture.range)
    }

    /// The memory of the bounce aperture from `offset` to the end of what backs it.
    #[inline]
    pub(crate) fn bounce_from(&self, offset: u64) -> Option<SharedSlice<'_>> {
        self.bounce.as_ref()?.memory.rest(offset)
    }

    /// The memory behind a target in an aperture, to the end of what backs it.
    #[inline]
    pub(crate) fn rest(&self, target: Target) -> Option<SharedSlice<'_>> {
        let aperture = match target.region {
            RegionId::BOUNCE => self.bounce.as_ref(),
            RegionId::COHERENT => self.coherent.as_ref(),
            _ => None,
        };
        aperture?.memory.rest(target.offset_bytes)
    }

    pub(crate) fn read(&self, iova: Iova, into: &mut [u8]) -> Result<(), AddressError> {
        self.access(iova, |memory, offset| memory.copy_out(offset, into))
    }

    pub(crate) fn write(&self, iova: Iova, from: &[u8]) -> Result<(), AddressError> {
        self.access(iova, |memory, offset| memory.copy_in(offset, from))
    }

    pub(crate) fn word32(&self, iova: Iova) -> Result<SharedU32<'_>, AddressError> {
        self.access(iova, SharedMemory::word32)
    }

    pub(crate) fn word32_mut(&self, iova: Iova) -> Result<SharedU32Mut<'_>, AddressError> {
        self.access(iova, SharedMemory::word32_mut)
    }

    pub(crate) fn word64(&self, iova: Iova) -> Result<SharedU64<'_>, AddressError> {
        self.access(iova, SharedMemory::word64)
    }

    pub(crate) fn word64_mut(&self, iova: Iova) -> Result<SharedU64Mut<'_>, AddressError> {
        self.access(iova, SharedMemory::word64_mut)
    }

    fn access<'a, T>(
        &'a self,
        iova: Iova,
        how: impl FnOnce(&'a SharedMemory, u64) -> Result<T, AccessError>,
    ) -> Result<T, AddressError> {
        let (memory, offset) = self.locate(iova).ok_or(AddressError::NoAperture { iova })?;
        how(memory, offset).map_err(|error| AddressError::new(iova, error))
    }

    fn locate(&self, iova: Iova) -> Option<(&SharedMemory, u64)> {
        [&self.bounce, &self.coherent]
            .into_iter()
            .flatten()
            .filter(|aperture| iova <= aperture.range.last())
            .find_map(|aperture| {
                let offset = iova.offset_from(aperture.range.start())?;
                Some((&aperture.memory, offset))
            })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::Relaxed;

    use domain_core::region::driver_memfd;

    use super::*;

    const PAGE: u64 = 4096;
    /// Not zero, so that an iova is never by chance an offset.
    const BASE: u64 = 0x10_0000;

    fn range(page: u64, pages: u64) -> IovaRange {
        IovaRange::from_len(Iova::new(BASE + page * PAGE), pages * PAGE).unwrap()
    }

    fn region(page: u64, pages: u64) -> RegionGrant {
        RegionGrant {
            range: range(page, pages),
            hugetlb: false,
            fd: driver_memfd("apertures-test", pages * PAGE).unwrap(),
        }
    }

    fn aperture(pages: u64, regions: Vec<RegionGrant>, access: Access) -> Result<Aperture, Error> {
        Aperture::map(range(0, pages), pages * PAGE, regions, access)
    }

    /// Bounce of four pages of which the third is not backed, coherent of two
    /// pages directly above it.
    fn apertures() -> Apertures {
        let bounce = aperture(4, vec![region(0, 2), region(3, 1)], Access::ReadWrite).unwrap();
        let coherent =
            Aperture::map(range(4, 2), 2 * PAGE, vec![region(4, 2)], Access::ReadWrite).unwrap();
        Apertures {
            bounce: Some(bounce),
            coherent: Some(coherent),
        }
    }

    #[test]
    fn what_is_written_at_an_iova_is_read_there_and_nowhere_else() {
        let apertures = apertures();
        let end_of_bounce = Iova::new(BASE + 4 * PAGE - 3);

        apertures.write(end_of_bounce, b"abc").unwrap();

        let mut around = [0xff; 3];
        apertures.read(end_of_bounce, &mut around).unwrap();
        assert_eq!(&around, b"abc");
        apertures
            .read(Iova::new(BASE + 4 * PAGE), &mut around)
            .unwrap();
        assert_eq!(around, [0; 3]);
    }

    #[test]
    fn an_access_that_leaves_the_backed_part_or_the_aperture_does_nothing() {
        let apertures = apertures();
        let at = |bytes| Iova::new(BASE + bytes);

        let into_the_hole = apertures.write(at(2 * PAGE - 1), b"ab").unwrap_err();
        let out_of_bounce = apertures.write(at(4 * PAGE - 1), b"ab").unwrap_err();

        assert!(
            matches!(into_the_hole, AddressError::NotBacked { behind, .. } if behind == 2 * PAGE)
        );
        assert!(
            matches!(out_of_bounce, AddressError::NotBacked { behind, .. } if behind == 4 * PAGE)
        );
        let mut byte = [0xff];
        apertures.read(at(2 * PAGE - 1), &mut byte).unwrap();
        assert_eq!(byte, [0]);
        for outside in [Iova::new(BASE - 1), at(6 * PAGE), Iova::new(u64::MAX)] {
            assert_eq!(
                apertures.read(outside, &mut byte),
                Err(AddressError::NoAperture { iova: outside })
            );
        }
    }

    #[test]
    fn words_are_cells_in_place_and_must_be_aligned() {
        let apertures = apertures();
        let iova = Iova::new(BASE + 8);

        apertures.word32_mut(iova).unwrap().store(7, Relaxed);
        apertures
            .word32_mut(Iova::new(BASE + 12))
            .unwrap()
            .store(1, Relaxed);

        assert_eq!(apertures.word32(iova).unwrap().load(Relaxed), 7);
        let both = apertures.word64(iova).unwrap().load(Relaxed);
        assert_eq!(
            both,
            if cfg!(target_endian = "little") {
                1 << 32 | 7
            } else {
                7 << 32 | 1
            }
        );
        let odd = Iova::new(BASE + 4);
        assert_eq!(
            apertures.word64_mut(odd).unwrap_err(),
            AddressError::Misaligned {
                iova: odd,
                align: 8
            }
        );
    }

    #[test]
    fn a_read_only_session_cannot_write() {
        let bounce = aperture(1, vec![region(0, 1)], Access::ReadOnly).unwrap();
        let apertures = Apertures {
            bounce: Some(bounce),
            coherent: None,
        };
        let iova = Iova::new(BASE);

        let refused = apertures.write(iova, b"x").unwrap_err();

        assert_eq!(refused, AddressError::ReadOnly { iova, len: 1 });
        assert!(apertures.word32_mut(iova).is_err());
        assert!(apertures.word32(iova).is_ok());
    }

    #[test]
    fn regions_that_overlap_or_are_too_short_are_not_mapped() {
        let overlapping = aperture(4, vec![region(0, 2), region(1, 2)], Access::ReadWrite);
        assert!(matches!(
            overlapping.unwrap_err(),
            Error::Region {
                cause: MapError::Overlap { .. },
                ..
            }
        ));

        let mut short = region(0, 2);
        short.fd = driver_memfd("apertures-test", PAGE).unwrap();
        assert!(matches!(
            aperture(4, vec![short], Access::ReadWrite).unwrap_err(),
            Error::Region {
                cause: MapError::FileTooSmall { .. },
                ..
            }
        ));
    }
}
