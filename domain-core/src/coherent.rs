//! Coherent memory: zeroed when it is given, seen by all sessions all the time.

use crate::addr::{Iova, IovaRange};
use crate::alloc::{AllocError, AllocRequest};
use crate::iotlb::NoRoom;
use crate::limits::QuotaExceeded;
use crate::mapping::{MappingId, MappingMissing};
use crate::session::Denied;

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CoherentSpec {
    /// Length, alignment and limit.
    pub place: AllocRequest,
    /// Belongs to the domain and stays when the session ends.
    pub persistent: bool,
}

impl CoherentSpec {
    /// So many bytes, anywhere, for the session.
    #[must_use]
    pub fn of(len_bytes: u64) -> CoherentSpec {
        CoherentSpec {
            place: AllocRequest::of(len_bytes),
            persistent: false,
        }
    }
}

/// A live allocation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allocated {
    /// Its name, with its first address.
    pub id: MappingId,
    /// Exactly the bytes that were asked for.
    pub range: IovaRange,
}

impl Allocated {
    /// Its first address.
    #[must_use]
    pub fn iova(&self) -> Iova {
        self.range.start()
    }
}

/// Why nothing was allocated. The domain is unchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum AllocCoherentError {
    #[error(transparent)]
    Denied(#[from] Denied),
    #[error(transparent)]
    Quota(#[from] QuotaExceeded),
    #[error("the domain has no coherent aperture")]
    NoAperture,
    #[error(transparent)]
    Alloc(#[from] AllocError),
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
}

/// Why nothing was freed. The allocation is as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum FreeCoherentError {
    #[error(transparent)]
    Denied(#[from] Denied),
    #[error(transparent)]
    Missing(#[from] MappingMissing),
}
