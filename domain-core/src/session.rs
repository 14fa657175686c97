//! Who is attached to a domain, and in which role.

use std::collections::BTreeSet;
use std::fmt;

use crate::addr::Iova;
use crate::memory::MemoryId;

/// Names one session on this node; never used for another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(u64);

impl SessionId {
    /// The session of this number.
    #[must_use]
    pub const fn new(number: u64) -> SessionId {
        SessionId(number)
    }

    /// Its number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// What a session is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Owns buffers: registers, maps, allocates.
    Driver,
    /// Accesses what was mapped and allocated.
    Device,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Driver => "DRIVER",
            Role::Device => "DEVICE",
        })
    }
}

/// Why a session may not do this at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum Denied {
    #[error("the domain is being deleted")]
    DomainClosed,
    #[error("session {session} has ended")]
    SessionEnded { session: SessionId },
    #[error("the bounce aperture was reset meanwhile")]
    BounceReset,
    #[error("session {session} is attached as {role}, this is for DRIVER")]
    WrongRole { session: SessionId, role: Role },
}

/// Why somebody could not attach.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum JoinError {
    #[error("the domain is being deleted")]
    DomainClosed,
    #[error(transparent)]
    Quota(#[from] crate::limits::QuotaExceeded),
}

/// What one session holds, so that its end costs what it holds and no more.
#[derive(Debug)]
pub(crate) struct Attached {
    pub(crate) role: Role,
    /// Keys of the domain's mapping table.
    pub(crate) mappings: BTreeSet<Iova>,
    pub(crate) memories: BTreeSet<MemoryId>,
}

impl Attached {
    pub(crate) fn new(role: Role) -> Attached {
        Attached {
            role,
            mappings: BTreeSet::new(),
            memories: BTreeSet::new(),
        }
    }
}

/// What one session holds, counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Holdings {
    /// Streaming mappings, those in transit included.
    pub streaming: usize,
    /// Coherent allocations, those in transit included.
    pub coherent: usize,
    /// Registered memories.
    pub memories: usize,
}
