//! Memory that a driver has registered: what is bounced from and to, and what is
//! mapped directly.

use std::fmt;
use std::sync::Arc;

use crate::iotlb::RegionId;
use crate::limits::QuotaExceeded;
use crate::region::ClientMemory;
use crate::session::{Denied, SessionId};

/// Names one registered memory in its domain; never used for another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MemoryId(u64);

impl MemoryId {
    /// The memory of this number.
    #[must_use]
    pub const fn new(number: u64) -> MemoryId {
        MemoryId(number)
    }

    /// Its number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for MemoryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// One registration.
#[derive(Debug)]
pub(crate) struct Registered {
    /// `None`: it belongs to the domain.
    pub(crate) owner: Option<SessionId>,
    /// Shared with the copies that are under way.
    pub(crate) memory: Arc<ClientMemory>,
    /// Streaming mappings that use it.
    pub(crate) mappings: u64,
    /// Direct mappings that use it.
    pub(crate) direct: u64,
    /// Its number in the IOTLB, which another memory has when this one is gone.
    pub(crate) region: RegionId,
}

/// One registration as others see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryView {
    /// Its name.
    pub id: MemoryId,
    /// Who registered it; `None`: it belongs to the domain.
    pub owner: Option<SessionId>,
    /// Size in bytes when it was registered.
    pub size_bytes: u64,
    /// Bytes may be copied back into it.
    pub writable: bool,
    /// Lies on huge pages.
    pub hugetlb: bool,
    /// Streaming mappings that use it.
    pub mappings: u64,
    /// Direct mappings that use it.
    pub direct: u64,
}

/// Why memory was not registered. Nothing is kept of it.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum RegisterError {
    #[error(transparent)]
    Denied(#[from] Denied),
    #[error(transparent)]
    Quota(#[from] QuotaExceeded),
}

/// Why a registration stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum UnregisterError {
    #[error(transparent)]
    Denied(#[from] Denied),
    #[error(transparent)]
    Missing(#[from] MemoryMissing),
    #[error("memory {id} is used by {mappings} streaming and {direct} direct mappings")]
    InUse {
        id: MemoryId,
        mappings: u64,
        direct: u64,
    },
}

/// Why a memory id leads nowhere for this session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum MemoryMissing {
    #[error("no memory {id} is registered")]
    NoSuchMemory { id: MemoryId },
    #[error("memory {id} belongs to another session")]
    NotYours { id: MemoryId },
}
