//! What is allocated in an aperture, and for whom.

use std::fmt;

use crate::addr::{Iova, IovaRange};
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
    pub(crate) kind: HeldKind,
}

#[derive(Debug)]
pub(crate) enum HeldKind {
    Streaming(Bounce),
    Coherent,
}

impl Held {
    pub(crate) fn aperture(&self) -> ApertureKind {
        match self.kind {
            HeldKind::Streaming(_) => ApertureKind::Bounce,
            HeldKind::Coherent => ApertureKind::Coherent,
        }
    }

    pub(crate) fn perm(&self) -> Perm {
        match &self.kind {
            HeldKind::Streaming(bounce) => bounce.direction.perm(),
            HeldKind::Coherent => Perm::ReadWrite,
        }
    }

    pub(crate) fn bounce(&self) -> Option<&Bounce> {
        match &self.kind {
            HeldKind::Streaming(bounce) => Some(bounce),
            HeldKind::Coherent => None,
        }
    }

    pub(crate) fn view(&self) -> MappingView {
        MappingView {
            id: self.id,
            owner: self.owner,
            visible: self.visible,
            perm: self.perm(),
            phase: self.phase,
            streaming: self.bounce().map(|bounce| StreamingView {
                direction: bounce.direction,
                memory: bounce.memory_id,
                offset: bounce.file_offset,
            }),
        }
    }
}

/// One mapping as others see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappingView {
    /// Its name.
    pub id: MappingId,
    /// Who holds it; `None`: the domain.
    pub owner: Option<SessionId>,
    /// What is visible.
    pub visible: IovaRange,
    /// What the device side may do with it.
    pub perm: Perm,
    /// Where it is in its life.
    pub phase: Phase,
    /// Where its bytes come from; `None` for a coherent allocation.
    pub streaming: Option<StreamingView>,
}

impl MappingView {
    /// The aperture it lies in.
    #[must_use]
    pub fn aperture(&self) -> ApertureKind {
        match self.streaming {
            Some(_) => ApertureKind::Bounce,
            None => ApertureKind::Coherent,
        }
    }
}

/// The driver's end of a streaming mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamingView {
    /// Which way bytes travel.
    pub direction: Direction,
    /// The driver's memory.
    pub memory: MemoryId,
    /// Where the buffer begins in it.
    pub offset: u64,
}

/// Which mappings to list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MappingFilter {
    /// Only what this session holds.
    pub owner: Option<SessionId>,
    /// Only what lies in this aperture.
    pub aperture: Option<ApertureKind>,
}

impl MappingFilter {
    pub(crate) fn admits(&self, held: &Held) -> bool {
        self.owner.is_none_or(|owner| held.owner == Some(owner))
            && self
                .aperture
                .is_none_or(|aperture| held.aperture() == aperture)
    }
}
