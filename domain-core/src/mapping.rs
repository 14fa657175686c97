//! What is allocated in an aperture, and for whom.

use std::fmt;

use crate::addr::{Iova, IovaRange};
use crate::domain::Link;
use crate::layout::ApertureKind;
use crate::memory::MemoryId;
use crate::perm::{Direction, Perm};
use crate::session::SessionId;
use crate::streaming::Bounce;

/// Names one mapping in its domain, with its iova; never used for another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MappingId(u64);

impl MappingId {
    /// The mapping of this number.
    #[must_use]
    pub const fn new(number: u64) -> MappingId {
        MappingId(number)
    }

    /// Its number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for MappingId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Where a mapping is in its life. In transit it belongs to the request that
/// moves it; everybody else sees it as absent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Its iovas are taken; bytes are being copied in.
    Reserved,
    /// Visible.
    Live,
    /// Not visible any more; bytes are being copied back or zeroed.
    Draining,
    /// Removed; some session has not acknowledged it yet.
    Invalidating,
    /// Removed; a session that has ended may still reach it.
    Quarantined,
}

/// Why an iova and an id name nothing that this session could end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum MappingMissing {
    #[error("no mapping {id} is live at {iova}")]
    NoSuchMapping { iova: Iova, id: MappingId },
    #[error("mapping {id} at {iova} belongs to another session")]
    NotYours { iova: Iova, id: MappingId },
}

/// One run of granules that somebody holds.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) id: MappingId,
    /// `None`: it belongs to the domain.
    pub(crate) owner: Option<SessionId>,
    /// What is visible: inside `granules`, exact to the byte.
    pub(crate) visible: IovaRange,
    /// What is taken: whole granules.
    pub(crate) granules: IovaRange,
    pub(crate) phase: Phase,
    /// Syncs that are copying right now. While there are any, the granules
    /// stay taken.
    pub(crate) syncs: u32,
    /// The reset of the bounce aperture that it was made after.
    pub(crate) epoch: u64,
    /// Generation in which it became visible for the first time.
    pub(crate) since: Option<u64>,
    /// Its granules are overwritten before they are free.
    pub(crate) scrub: bool,
    /// In quarantine: who may still reach it.
    pub(crate) blocked_by: Option<SessionId>,
    /// Among what its owner holds.
    pub(crate) link: Link,
    pub(crate) kind: HeldKind,
}

#[derive(Debug)]
pub(crate) enum HeldKind {
    Streaming(Streaming),
    Coherent,
    Lease,
}

/// A streaming mapping.
#[derive(Debug)]
pub(crate) struct Streaming {
    direction: Direction,
    source: Source,
    /// Only while it is live. In transit it is with the request that moves it; what has come to its
    /// end keeps nothing of a client.
    bounce: Option<Bounce>,
}

impl Streaming {
    /// One that this transfer is going to make.
    pub(crate) fn of(bounce: &Bounce) -> Streaming {
        Streaming {
            direction: bounce.direction,
            source: Source {
                memory: bounce.memory_id,
                offset: bounce.file_offset,
            },
            bounce: None,
        }
    }
}

impl Held {
    pub(crate) fn aperture(&self) -> ApertureKind {
        match self.kind {
            HeldKind::Streaming(_) | HeldKind::Lease => ApertureKind::Bounce,
            HeldKind::Coherent => ApertureKind::Coherent,
        }
    }

    pub(crate) fn perm(&self) -> Perm {
        match &self.kind {
            HeldKind::Streaming(streaming) => streaming.direction.perm(),
            HeldKind::Coherent | HeldKind::Lease => Perm::ReadWrite,
        }
    }

    /// The transfer, while it is live.
    pub(crate) fn bounce(&self) -> Option<&Bounce> {
        match &self.kind {
            HeldKind::Streaming(streaming) => streaming.bounce.as_ref(),
            HeldKind::Coherent | HeldKind::Lease => None,
        }
    }

    /// Takes the transfer out: it is in transit, or has come to its end.
    pub(crate) fn take_bounce(&mut self) -> Option<Bounce> {
        match &mut self.kind {
            HeldKind::Streaming(streaming) => streaming.bounce.take(),
            HeldKind::Coherent | HeldKind::Lease => None,
        }
    }

    /// It is live, and keeps its transfer, if it has one.
    pub(crate) fn put_bounce(&mut self, bounce: Option<Bounce>) {
        if let HeldKind::Streaming(streaming) = &mut self.kind {
            streaming.bounce = bounce;
        }
    }

    /// The memory that it uses, until it has come to its end.
    pub(crate) fn uses(&self) -> Option<MemoryId> {
        match &self.kind {
            HeldKind::Streaming(streaming) if !self.is_retired() => Some(streaming.source.memory),
            _ => None,
        }
    }

    pub(crate) fn is_lease(&self) -> bool {
        matches!(self.kind, HeldKind::Lease)
    }

    /// Was the bounce aperture reset since it was made, of which this is the present epoch?
    pub(crate) fn outlived(&self, bounce_epoch: u64) -> bool {
        self.aperture() == ApertureKind::Bounce && self.epoch != bounce_epoch
    }

    /// Is it live, under that name, and this session's?
    pub(crate) fn is_live_as(&self, session: SessionId, iova: Iova, id: MappingId) -> bool {
        self.visible.start() == iova
            && self.id == id
            && self.phase == Phase::Live
            && self.owner == Some(session)
    }

    /// Has it come to its end, but for its granules?
    pub(crate) fn is_retired(&self) -> bool {
        matches!(self.phase, Phase::Invalidating | Phase::Quarantined)
    }

    pub(crate) fn view(&self) -> MappingView {
        MappingView {
            id: Some(self.id),
            owner: self.owner,
            visible: self.visible,
            perm: self.perm(),
            phase: self.phase,
            blocked_by: self.blocked_by,
            kind: match &self.kind {
                HeldKind::Streaming(Streaming {
                    direction, source, ..
                }) => ViewKind::Streaming {
                    direction: *direction,
                    source: *source,
                },
                HeldKind::Coherent => ViewKind::Coherent,
                HeldKind::Lease => ViewKind::Lease,
            },
        }
    }
}

/// One mapping as others see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappingView {
    /// Its name; a direct mapping has none.
    pub id: Option<MappingId>,
    /// Who holds it; `None`: the domain.
    pub owner: Option<SessionId>,
    /// What is visible.
    pub visible: IovaRange,
    /// What the device side may do with it.
    pub perm: Perm,
    /// Where it is in its life.
    pub phase: Phase,
    /// What it is.
    pub kind: ViewKind,
    /// In quarantine: who may still reach it.
    pub blocked_by: Option<SessionId>,
}

impl MappingView {
    /// The registered memory behind it.
    #[must_use]
    pub fn source(&self) -> Option<Source> {
        match self.kind {
            ViewKind::Streaming { source, .. } | ViewKind::Direct { source } => Some(source),
            ViewKind::Coherent | ViewKind::Lease => None,
        }
    }
}

/// What a mapping is, and where its bytes come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ViewKind {
    /// A bounced buffer.
    Streaming {
        /// Which way bytes travel.
        direction: Direction,
        /// The driver's end.
        source: Source,
    },
    /// A coherent allocation.
    Coherent,
    /// Bounce memory that a driver divides up by itself.
    Lease,
    /// Registered memory, without a bounce.
    Direct {
        /// The memory.
        source: Source,
    },
}

/// A place in registered memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    /// The memory.
    pub memory: MemoryId,
    /// Where in it, in bytes.
    pub offset: u64,
}

/// A kind of mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MappingKind {
    /// [`ViewKind::Streaming`].
    Streaming,
    /// [`ViewKind::Coherent`].
    Coherent,
    /// [`ViewKind::Lease`].
    Lease,
    /// [`ViewKind::Direct`].
    Direct,
}

impl ViewKind {
    /// Without the details.
    #[must_use]
    pub const fn kind(&self) -> MappingKind {
        match self {
            ViewKind::Streaming { .. } => MappingKind::Streaming,
            ViewKind::Coherent => MappingKind::Coherent,
            ViewKind::Lease => MappingKind::Lease,
            ViewKind::Direct { .. } => MappingKind::Direct,
        }
    }
}

/// Which mappings to list; what is `None` asks for nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MappingFilter {
    /// Only what this session holds.
    pub owner: Option<SessionId>,
    /// Only mappings of this kind.
    pub kind: Option<MappingKind>,
    /// Only what leads to this memory.
    pub memory: Option<MemoryId>,
    /// Only what shows this byte of its memory.
    pub memory_offset: Option<u64>,
    /// Only what overlaps this range.
    pub range: Option<IovaRange>,
}

impl MappingFilter {
    pub(crate) fn admits(&self, view: &MappingView) -> bool {
        let source = view.source();
        let shows = |offset: u64| {
            let skipped = source.and_then(|source| offset.checked_sub(source.offset));
            skipped.is_some_and(|skipped| u128::from(skipped) < view.visible.bytes())
        };
        self.owner.is_none_or(|owner| view.owner == Some(owner))
            && self.kind.is_none_or(|kind| view.kind.kind() == kind)
            && self
                .memory
                .is_none_or(|memory| source.is_some_and(|source| source.memory == memory))
            && self.memory_offset.is_none_or(shows)
            && self.range.is_none_or(|range| range.overlaps(view.visible))
    }
}
