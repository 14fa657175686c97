//! An aperture: iovas, and the region that backs them.

use std::io;

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
    scrub_with: ScrubWith,
}

/// What memory is overwritten with when it is freed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ScrubWith {
    /// Zeroes.
    #[default]
    Zero,
    /// [`POISON`], also before it is used for the first time. For tests:
    /// whoever ever reads it in a mapping has found a bug of ours.
    Poison,
}

/// A byte that no zeroed memory holds.
pub const POISON: u8 = 0xa5;

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
        scrub_with: ScrubWith,
    ) -> Result<Aperture, RegionError> {
        let len_bytes = range.len_bytes().unwrap_or(u64::MAX);
        let region = Region::create(&format!("domaind:{domain}:{kind}"), len_bytes, backing)?;
        let aperture = Aperture {
            kind,
            range,
            region,
            scrub_with,
        };
        // A new region is zero as it is.
        if scrub_with == ScrubWith::Poison {
            aperture.scrub(range);
        }
        Ok(aperture)
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

    /// A reopened fd of its memory for one client, under a mark that
    /// [`Domain::is_granted`](crate::Domain::is_granted) asks for.
    ///
    /// # Errors
    /// [`RegionError`] if it cannot be reopened.
    pub fn grant(&self, access: Access, mark: u64) -> Result<Grant, RegionError> {
        self.region.grant_marked(access, mark)
    }

    /// Does anybody still hold a grant of this mark?
    ///
    /// # Errors
    /// The kernel's.
    pub(crate) fn is_granted(&self, mark: u64) -> io::Result<bool> {
        self.region.is_marked(mark)
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

    /// Must memory be overwritten whenever it is freed?
    pub(crate) fn is_poisoned(&self) -> bool {
        self.scrub_with == ScrubWith::Poison
    }

    /// Overwrites a part that is being freed.
    pub(crate) fn scrub(&self, part: IovaRange) {
        self.fill(
            part,
            match self.scrub_with {
                ScrubWith::Zero => 0,
                ScrubWith::Poison => POISON,
            },
        );
    }

    /// Zeroes a part that is being taken.
    pub(crate) fn zero(&self, part: IovaRange) {
        self.fill(part, 0);
    }

    fn fill(&self, part: IovaRange, byte: u8) {
        let len = part
            .len_bytes()
            .expect("an aperture is shorter than the space");
        self.memory()
            .fill(self.offset(part.start()), len, byte)
            .expect("the part lies in this aperture");
    }
}
