//! Leases: granules of the bounce aperture that one driver divides up by itself.
//!
//! The service zeroes a lease before it gives it, and again before anybody else
//! can have its granules. In between it knows nothing of what lies in it: which
//! buffer is where, and who was told.

use crate::addr::{Iova, IovaRange};
use crate::alloc::{AllocError, AllocRequest};
use crate::iotlb::NoRoom;
use crate::limits::QuotaExceeded;
use crate::mapping::{MappingId, MappingMissing};
use crate::session::Denied;

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseSpec {
    /// Length, which is rounded up to whole granules, alignment and limit.
    pub place: AllocRequest,
}

impl LeaseSpec {
    /// So many bytes, anywhere.
    #[must_use]
    pub fn of(len_bytes: u64) -> LeaseSpec {
        LeaseSpec {
            place: AllocRequest::of(len_bytes),
        }
    }
}

/// A live lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leased {
    /// Its name, with its first address.
    pub id: MappingId,
    /// Whole granules, at least as many bytes as were asked for.
    pub range: IovaRange,
}

impl Leased {
    /// Its first address.
    #[must_use]
    pub fn iova(&self) -> Iova {
        self.range.start()
    }
}

/// Why nothing was leased. The domain is unchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum LeaseError {
    #[error(transparent)]
    Denied(#[from] Denied),
    #[error(transparent)]
    Quota(#[from] QuotaExceeded),
    #[error(transparent)]
    Bytes(#[from] LeaseBytesExceeded),
    #[error("the domain has no bounce aperture")]
    NoAperture,
    #[error(transparent)]
    Alloc(#[from] AllocError),
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
}

/// One session would hold more in leases than the domain allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a session may hold {limit} bytes in leases, this one holds {used} and would take {want} more"
)]
pub struct LeaseBytesExceeded {
    /// [`Quotas::lease_bytes`](crate::limits::Quotas::lease_bytes).
    pub limit: u64,
    /// What it holds, in whole granules; what it has released and what is not
    /// free yet included.
    pub used: u64,
    /// What it asked for, in whole granules.
    pub want: u64,
}

/// Why nothing was released. The lease is as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum ReleaseError {
    #[error(transparent)]
    Denied(#[from] Denied),
    #[error(transparent)]
    Missing(#[from] MappingMissing),
}

/// Some leases, counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LeaseTally {
    /// How many.
    pub count: usize,
    /// Their bytes, in whole granules.
    pub bytes: u64,
}

impl LeaseTally {
    pub(crate) fn add(&mut self, granules: IovaRange) {
        self.count += 1;
        self.bytes += lease_bytes(granules);
    }

    pub(crate) fn subtract(&mut self, granules: IovaRange) {
        self.count -= 1;
        self.bytes -= lease_bytes(granules);
    }
}

impl FromIterator<IovaRange> for LeaseTally {
    fn from_iter<I: IntoIterator<Item = IovaRange>>(leases: I) -> LeaseTally {
        let mut tally = LeaseTally::default();
        leases.into_iter().for_each(|lease| tally.add(lease));
        tally
    }
}

fn lease_bytes(granules: IovaRange) -> u64 {
    granules
        .len_bytes()
        .expect("an aperture is shorter than the space")
}
