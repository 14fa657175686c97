//! An aperture: iovas, and the region that backs them.

use crate::addr::{Iova, IovaRange};
use crate::layout::ApertureKind;
use crate::region::{Access, Backing, Grant, Region, RegionError, SharedMemory};

/// One aperture of a domain with its memory. File offset = iova - start.
#[derive(Debug)]
pub struct Aperture {
    kind: ApertureKind,
    range: IovaRange,
    /// As long as `range`.
    region: Region,
}

impl Aperture {
    /// Creates the memory for `range`. The region shows in `/proc` as
    /// `domaind:{domain}:{kind}`.
    ///
    /// # Errors
    /// [`RegionError`]; nothing is left behind.
    pub fn create(
        domain: &str,
        kind: ApertureKind,
        range: IovaRange,
        backing: Backing,
    ) -> Result<Aperture, RegionError> {
        let len_bytes = range.len_bytes().unwrap_or(u64::MAX);
        let region = Region::create(&format!("domaind:{domain}:{kind}"), len_bytes, backing)?;
        Ok(Aperture {
            kind,
            range,
            region,
        })
    }

    /// Which aperture it is.
    #[must_use]
    pub fn kind(&self) -> ApertureKind {
        self.kind
    }

    /// Its addresses.
    #[must_use]
    pub fn range(&self) -> IovaRange {
        self.range
    }

    /// The memory behind it.
    #[must_use]
    pub fn backing(&self) -> Backing {
        self.region.backing()
    }

    /// A reopened fd of its memory for one client.
    ///
    /// # Errors
    /// [`RegionError`] if it cannot be reopened.
    pub fn grant(&self, access: Access) -> Result<Grant, RegionError> {
        self.region.grant(access)
    }

    /// The daemon's own mapping of its memory.
    #[must_use]
    pub fn memory(&self) -> &SharedMemory {
        self.region.memory()
    }

    /// Where an address of this aperture lies in its memory.
    pub(crate) fn offset(&self, iova: Iova) -> u64 {
        iova.offset_from(self.range.start())
            .expect("the address lies in this aperture")
    }

    /// Zeroes a part of it.
    pub(crate) fn zero(&self, part: IovaRange) {
        let len = part
            .len_bytes()
            .expect("an aperture is shorter than the space");
        self.memory()
            .fill(self.offset(part.start()), len, 0)
            .expect("the part lies in this aperture");
    }
}
