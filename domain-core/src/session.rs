//! Who is attached to a domain, and in which role.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use crate::domain::Chain;
use crate::iotlb::{Barrier, RegionId};
use crate::lease::LeaseTally;
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

/// Whom it is charged to what sessions hold back when they have ended: a user.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Account(pub u32);

/// A session as its domain has to wait for it. Called under the domain's lock:
/// must not block, nor call the domain.
pub trait Reader: fmt::Debug + Send + Sync {
    /// Does it acknowledge every removal by a message of its own?
    fn by_frames(&self) -> bool;

    /// Might one of its threads still use a translation from before
    /// `generation`, which has just been published? If not, that is its
    /// acknowledgment. Not asked of one that answers by frames. The barrier was run
    /// after that was published.
    fn holds_older_than(&self, generation: u64, barrier: &Barrier) -> bool;

    /// The domain waits for its acknowledgment of `generation`:
    /// [`Domain::acknowledge`](crate::Domain::acknowledge).
    fn ask(&self, generation: u64);

    /// It has ended, and what is made after `generation` must be out of its
    /// reach: from now on every walk of its threads is void that looks at its end
    /// afterwards.
    fn fence(&self, generation: u64);

    /// Leases of it are taken away by somebody else. Called before they are hidden,
    /// and before it is asked, which then happens in any case, whatever it pins: a thread of it that pins a view without
    /// them, or pins after it has looked for pins itself, must see this before it touches them.
    fn revoke(&self);
}

/// Somebody who joins a domain.
#[derive(Clone, Debug)]
pub struct Joining {
    /// As what.
    pub role: Role,
    /// Who pays for what it holds back.
    pub account: Account,
    /// How the domain waits for it; `None`: it never translates, and so holds
    /// nothing.
    pub reader: Option<Arc<dyn Reader>>,
}

impl From<Role> for Joining {
    /// Somebody who never translates.
    fn from(role: Role) -> Joining {
        Joining {
            role,
            account: Account::default(),
            reader: None,
        }
    }
}

/// Something was taken out of sight. It may be used again when all sessions that
/// could have seen it have acknowledged that: [`Domain::progress`](crate::Domain::progress).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Removal {
    /// Number of the first state without it.
    pub generation: u64,
}

/// How far a removal has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// These attached sessions have not acknowledged it; none if it is being
    /// zeroed.
    Waiting(Vec<SessionId>),
    /// All attached sessions have; these have ended, and may still reach it.
    Quarantined(Vec<SessionId>),
    /// It is as if it had never been.
    Done,
}

/// What an attached session was asked to acknowledge and has not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owed {
    /// What it has acknowledged.
    pub acked: u64,
    /// What it was asked for.
    pub generation: u64,
    /// Regions of the memories that it has opened and must close before.
    pub closed: Vec<RegionId>,
}

/// Why an acknowledgment counts for nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum AckError {
    #[error("session {session} is not there")]
    NoSession { session: SessionId },
    #[error("session {session} acknowledges generation {generation}, and the newest is {current}")]
    Ahead {
        session: SessionId,
        generation: u64,
        current: u64,
    },
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
    /// Its records among the domain's.
    pub(crate) mappings: Chain,
    pub(crate) memories: BTreeSet<MemoryId>,
    /// Leases among the mappings, those included that have ended and whose granules
    /// are not free yet: so one that takes and releases cannot hold back more
    /// than it may hold.
    pub(crate) leases: LeaseTally,
}

impl Attached {
    pub(crate) fn new(role: Role) -> Attached {
        Attached {
            role,
            mappings: Chain::default(),
            memories: BTreeSet::new(),
            leases: LeaseTally::default(),
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
    /// Leases, those in transit included.
    pub leases: LeaseTally,
    /// Registered memories.
    pub memories: usize,
}
