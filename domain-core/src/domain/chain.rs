//! What one session holds: a chain through the records themselves, so that a mapping that comes and
//! goes allocates nothing for it, and the end of a session costs what it holds and no more.

use super::state::State;
use crate::addr::{Iova, IovaRange};
use crate::mapping::Held;
use crate::session::{Attached, SessionId};

/// Where a session's chain begins.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Chain {
    first: Option<Iova>,
    len: usize,
}

/// A record's neighbours in the chain of its owner.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Link {
    before: Option<Iova>,
    after: Option<Iova>,
}

impl Chain {
    pub(crate) fn len(self) -> usize {
        self.len
    }
}

impl State {
    /// A record that is going to be added at `at` belongs to this session. Answers its link.
    pub(super) fn link(&mut self, owner: SessionId, at: Iova, lease: Option<IovaRange>) -> Link {
        let attached = self.attached(owner);
        if let Some(granules) = lease {
            attached.leases.add(granules);
        }
        let after = attached.mappings.first.replace(at);
        attached.mappings.len += 1;
        if let Some(after) = after {
            self.held_mut(after).link.before = Some(at);
        }
        let before = None;
        Link { before, after }
    }

    /// A record that was taken out belonged to this session, if that is still there.
    pub(super) fn unlink(&mut self, owner: SessionId, held: &Held) {
        let Some(attached) = self.sessions.get_mut(&owner) else {
            return;
        };
        if held.is_lease() {
            attached.leases.subtract(held.granules);
        }
        let Link { before, after } = held.link;
        attached.mappings.len -= 1;
        match before {
            Some(before) => self.held_mut(before).link.after = after,
            None => attached.mappings.first = after,
        }
        if let Some(after) = after {
            self.held_mut(after).link.before = before;
        }
    }

    /// All that a session holds, what it has ended and what is not free yet included; the newest
    /// first.
    pub(super) fn held_by(&self, attached: &Attached) -> impl Iterator<Item = &Held> {
        let mut next = attached.mappings.first;
        std::iter::from_fn(move || {
            let held = &self.held[&next?];
            next = held.link.after;
            Some(held)
        })
    }
}
