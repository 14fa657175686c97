//! Sessions as a domain has to wait for them: which view each of them holds,
//! and who may still reach what.
//!
//! An attached session *acknowledges* a generation when none of its threads
//! holds a translation that is older. One that has ended without saying that it
//! holds nothing any more is a *ghost*: its process, or one that it handed its
//! memory to, may go on with what it could reach when it ended. What was made
//! later it cannot reach: whoever walks the page table looks behind the walk
//! whether its session has ended ([`Reader::fence`]).

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::iotlb::{Barrier, RegionId};
use crate::memory::MemoryId;
use crate::session::{Account, AckError, Owed, Reader, SessionId};

/// Everybody who can translate, or could.
#[derive(Debug, Default)]
pub(super) struct Readers {
    attached: BTreeMap<SessionId, Attending>,
    ghosts: BTreeMap<SessionId, Ghost>,
}

#[derive(Debug)]
struct Attending {
    view: View,
    /// `None`: it never translates.
    reader: Option<Arc<dyn Reader>>,
    /// Leases were taken away from it, and it was not asked yet.
    revoked: bool,
}

/// What a session has said, and what it was asked and given.
#[derive(Debug)]
struct View {
    /// It holds nothing older.
    acked: u64,
    /// It was asked for this; owes it while that is more than `acked`.
    asked: u64,
    account: Account,
    /// Memories whose file it has been given, and when they were closed. A
    /// closed one goes from here with the acknowledgment of that generation.
    opened: BTreeMap<MemoryId, Opened>,
}

#[derive(Clone, Copy, Debug)]
struct Opened {
    region: RegionId,
    closed: Option<u64>,
}

#[derive(Debug)]
struct Ghost {
    view: View,
    /// What was made later is out of its reach.
    until: u64,
}

/// What of a removed thing tells who could reach it.
#[derive(Clone, Copy, Debug)]
pub(super) enum Reach {
    /// Memory of an aperture, visible since this generation.
    Aperture { since: u64 },
    /// Registered memory, for whoever was given its file, through a mapping that
    /// is visible since this generation.
    Memory { memory: MemoryId, since: u64 },
    /// Only a name: nothing is reached by it alone.
    Nothing,
}

impl Readers {
    pub(super) fn join(
        &mut self,
        session: SessionId,
        generation: u64,
        account: Account,
        reader: Option<Arc<dyn Reader>>,
    ) {
        let view = View {
            acked: generation,
            asked: generation,
            account,
            opened: BTreeMap::new(),
        };
        self.attached.insert(
            session,
            Attending {
                view,
                reader,
                revoked: false,
            },
        );
    }

    /// The session holds nothing any more, whether it is attached or a ghost.
    pub(super) fn forget(&mut self, session: SessionId) {
        self.attached.remove(&session);
        self.ghosts.remove(&session);
    }

    /// An attached session becomes a ghost.
    pub(super) fn fence(&mut self, session: SessionId, generation: u64) {
        let Some(Attending { view, reader, .. }) = self.attached.remove(&session) else {
            return;
        };
        if let Some(reader) = reader {
            reader.fence(generation);
            let ghost = Ghost {
                view,
                until: generation,
            };
            self.ghosts.insert(session, ghost);
        }
    }

    /// Leases of an attached session are taken away, and are going to be hidden.
    pub(super) fn revoke(&mut self, session: SessionId) {
        if let Some(attending) = self.attached.get_mut(&session) {
            attending.revoked = true;
            attending.reader.iter().for_each(|reader| reader.revoke());
        }
    }

    /// Something was removed, and `generation` is published: who might hold an
    /// older view is asked to acknowledge it. `closed` are memories that nothing
    /// leads to any more; `actor` is the session that removes.
    pub(super) fn ask(&mut self, generation: u64, closed: &[MemoryId], actor: Option<SessionId>) {
        let barrier = Barrier::run();
        for (session, attending) in &mut self.attached {
            attending.ask(generation, closed, actor == Some(*session), &barrier);
        }
        for ghost in self.ghosts.values_mut() {
            ghost.view.close(generation, closed);
        }
    }

    /// # Errors
    /// [`AckError`]; nothing is changed.
    pub(super) fn acknowledge(
        &mut self,
        session: SessionId,
        generation: u64,
        current: u64,
    ) -> Result<(), AckError> {
        let ghost = self.ghosts.get_mut(&session).map(|ghost| &mut ghost.view);
        let attached = self.attached.get_mut(&session).map(|there| &mut there.view);
        let view = attached.or(ghost).ok_or(AckError::NoSession { session })?;
        if generation > current {
            return Err(AckError::Ahead {
                session,
                generation,
                current,
            });
        }
        view.acknowledge(generation);
        Ok(())
    }

    /// What all attached sessions have acknowledged, at most `current`.
    pub(super) fn floor(&self, current: u64) -> u64 {
        let acked = self.attached.values().map(|there| there.view.acked);
        acked.fold(current, u64::min)
    }

    /// Attached sessions that have not acknowledged a generation.
    pub(super) fn behind(&self, generation: u64) -> impl Iterator<Item = SessionId> {
        // Who was not asked for it has it acknowledged, or did not see what it removed.
        let behind = move |view: &View| view.acked < generation && view.asked > view.acked;
        self.attached
            .iter()
            .filter(move |(_, there)| behind(&there.view))
            .map(|(session, _)| *session)
    }

    /// A ghost that could still use what was removed at `removed`.
    pub(super) fn blocker(&self, removed: u64, reach: Reach) -> Option<SessionId> {
        let could = |ghost: &Ghost| {
            ghost.view.acked < removed
                && match reach {
                    Reach::Aperture { since } => since <= ghost.until,
                    Reach::Memory { memory, since } => {
                        since <= ghost.until && ghost.view.opened.contains_key(&memory)
                    }
                    Reach::Nothing => false,
                }
        };
        let mut ghosts = self.ghosts.iter();
        ghosts
            .find(|(_, ghost)| could(ghost))
            .map(|(session, _)| *session)
    }

    /// When the oldest ghost was fenced that has opened memory.
    pub(super) fn oldest_fence(&self) -> Option<u64> {
        let ghosts = self.ghosts.values();
        let knowing = ghosts.filter(|ghost| !ghost.view.opened.is_empty());
        knowing.map(|ghost| ghost.until).min()
    }

    /// A session is given the file of a memory.
    pub(super) fn open(&mut self, session: SessionId, memory: MemoryId, region: RegionId) {
        let opened = Opened {
            region,
            closed: None,
        };
        if let Some(there) = self.attached.get_mut(&session) {
            there.view.opened.insert(memory, opened);
        }
    }

    /// Has a session, attached or not, files of memories that may be mapped?
    pub(super) fn has_opened(&self, session: SessionId) -> bool {
        self.view(session)
            .is_some_and(|view| !view.opened.is_empty())
    }

    /// What an attached session owes.
    pub(super) fn owed(&self, session: SessionId) -> Option<Owed> {
        let view = &self.attached.get(&session)?.view;
        let closed = view
            .opened
            .values()
            .filter(|opened| opened.closed.is_some());
        (view.asked > view.acked).then(|| Owed {
            acked: view.acked,
            generation: view.asked,
            closed: closed.map(|opened| opened.region).collect(),
        })
    }

    /// Does nobody hold a view older than `generation`, which is the present one, nor could reach
    /// anything that was visible before?
    pub(super) fn all_let_go_of(&self, generation: u64) -> bool {
        self.ghosts.is_empty() && self.floor(generation) == generation
    }

    pub(super) fn is_ghost(&self, session: SessionId) -> bool {
        self.ghosts.contains_key(&session)
    }

    pub(super) fn ghosts(&self) -> usize {
        self.ghosts.len()
    }

    pub(super) fn account(&self, session: SessionId) -> Option<Account> {
        self.view(session).map(|view| view.account)
    }

    /// Everybody, by number: attached or ghost.
    pub(super) fn all(&self) -> impl Iterator<Item = SessionId> {
        let mut all: Vec<_> = self.attached.keys().chain(self.ghosts.keys()).collect();
        all.sort_unstable();
        all.into_iter().copied()
    }

    /// What a session, attached or not, has acknowledged, and what it was asked for.
    pub(super) fn acked_and_asked(&self, session: SessionId) -> Option<(u64, u64)> {
        self.view(session).map(|view| (view.acked, view.asked))
    }

    fn view(&self, session: SessionId) -> Option<&View> {
        let attached = self.attached.get(&session).map(|there| &there.view);
        attached.or_else(|| self.ghosts.get(&session).map(|ghost| &ghost.view))
    }

    pub(super) fn check_invariants(&self, current: u64) {
        let attached = self.attached.iter().map(|(id, there)| (id, &there.view));
        let ghosts = self.ghosts.iter().map(|(id, ghost)| (id, &ghost.view));
        for (session, view) in attached.chain(ghosts) {
            assert!(
                view.acked <= current && view.asked <= current,
                "session {session} is asked for what has been"
            );
        }
        let twice = self.ghosts.keys().find(|id| self.attached.contains_key(id));
        assert_eq!(twice, None, "a session is attached or a ghost");
    }
}

impl Attending {
    fn ask(&mut self, generation: u64, closed: &[MemoryId], is_own: bool, barrier: &Barrier) {
        let revoked = std::mem::take(&mut self.revoked);
        let must_close = self.view.close(generation, closed);
        let Some(reader) = &self.reader else {
            return self.view.acknowledge(generation);
        };
        let is_asked = self.view.asked.max(self.view.acked) >= generation;
        if is_asked && !must_close {
            return;
        }
        // Only a frame can say that memory is closed, or that an older one is. And who pins for leases alone may have no
        // fence, so that a look could miss it: that was promised.
        let owes = self.view.asked > self.view.acked;
        let must_say = must_close || owes || (revoked && !reader.by_frames());
        if !must_say {
            let clear = match reader.by_frames() {
                // Whoever removes has let go of it before.
                true => is_own,
                false => !reader.holds_older_than(generation, barrier),
            };
            if clear {
                return self.view.acknowledge(generation);
            }
        }
        self.view.asked = generation;
        reader.ask(generation);
    }
}

impl View {
    fn acknowledge(&mut self, generation: u64) {
        self.acked = self.acked.max(generation);
        let acked = self.acked;
        self.opened
            .retain(|_, opened| opened.closed.is_none_or(|closed| closed > acked));
    }

    /// Notes that memories are closed; answers whether one of them was open.
    fn close(&mut self, generation: u64, closed: &[MemoryId]) -> bool {
        let mut any = false;
        for memory in closed {
            let open = self.opened.get_mut(memory);
            if let Some(open) = open.filter(|open| open.closed.is_none()) {
                open.closed = Some(generation);
                any = true;
            }
        }
        any
    }
}
