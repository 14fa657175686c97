//! Leases: reserve, zero, go live; hide, zero, free.

use std::collections::BTreeSet;

use super::Domain;
use super::state::{FillJob, State};
use super::transit::Reservation;
use crate::addr::{Granule, Iova};
use crate::layout::ApertureKind;
use crate::lease::{LeaseBytesExceeded, LeaseError, LeaseSpec, LeaseTally, Leased, ReleaseError};
use crate::limits::Quota;
use crate::mapping::{HeldKind, MappingId, Phase};
use crate::session::{Removal, SessionId};

impl Domain {
    /// Gives a driver zeroed granules of the bounce aperture to divide up. They
    /// are its own until it releases them, ends, or the aperture is reset.
    ///
    /// # Errors
    /// [`LeaseError`]; nothing is changed.
    pub fn lease(&self, session: SessionId, spec: &LeaseSpec) -> Result<Leased, LeaseError> {
        let granule = self.layout.granule();
        let job = self.lock().reserve_lease(granule, session, spec)?;
        let mut made = Reservation::new(self, job);
        self.held_aperture(ApertureKind::Bounce)
            .zero(made.job.granules);
        let live = made.go_live(&mut self.lock());
        live?;
        Ok(Leased {
            id: made.job.id,
            range: made.job.visible,
        })
    }

    /// Takes a lease back from its session. Its granules are zeroed before
    /// anybody else can have them.
    ///
    /// # Errors
    /// [`ReleaseError`]; the lease is as it was.
    pub fn release_lease(
        &self,
        session: SessionId,
        iova: Iova,
        id: MappingId,
    ) -> Result<Removal, ReleaseError> {
        let mut state = self.lock();
        state.driver(session)?;
        state.lease_of(session, iova, id)?;
        state.hide_all(&[iova]);
        let nothing = state.retire(iova, true);
        debug_assert!(nothing.is_none(), "a lease keeps no client's file");
        state.ask_readers(&[], Some(session));
        let removal = state.removal();
        self.settle(state, Vec::new());
        Ok(removal)
    }
}

impl State {
    pub(super) fn reserve_lease(
        &mut self,
        granule: Granule,
        session: SessionId,
        spec: &LeaseSpec,
    ) -> Result<FillJob, LeaseError> {
        self.driver(session)?;
        if self.bounce_iovas.is_none() {
            return Err(LeaseError::NoAperture);
        }
        self.quotas
            .admit(Quota::Mappings, self.charged_mappings(session))?;
        let held = self.attached(session).leases;
        self.quotas.admit(Quota::Leases, held.count)?;
        self.admit_lease_bytes(held, granule.round_up(spec.place.len_bytes))?;
        let granules = self.take(ApertureKind::Bounce, spec.place)?;
        self.make_room(ApertureKind::Bounce, granules)?;
        let id = self.hold(Some(session), granules, granules, HeldKind::Lease);
        Ok(FillJob {
            at: granules.start(),
            id,
            granules,
            visible: granules,
            bounce: None,
        })
    }

    /// May a session take so many more bytes? One that rounds up past 2^64 fits no
    /// aperture, and is refused by its allocator, which says how long a hole there is.
    fn admit_lease_bytes(
        &self,
        held: LeaseTally,
        want: Option<u64>,
    ) -> Result<(), LeaseBytesExceeded> {
        let limit = self.quotas.lease_bytes;
        let used = held.bytes;
        match want {
            Some(want) if want > limit.saturating_sub(used) => {
                Err(LeaseBytesExceeded { limit, used, want })
            }
            _ => Ok(()),
        }
    }

    /// The most that any session holds: what a quota may not be set below.
    pub(super) fn most_leased(&self) -> LeaseTally {
        let held = || self.sessions.values().map(|attached| attached.leases);
        LeaseTally {
            count: held().map(|leases| leases.count).max().unwrap_or(0),
            bytes: held().map(|leases| leases.bytes).max().unwrap_or(0),
        }
    }

    /// Tells sessions that the service takes live leases of theirs away. Called
    /// before these are hidden, and so before anybody is asked: who pins a view
    /// without them, or is seen to pin none that is older, sees this word before it
    /// touches them again.
    pub(super) fn revoke_leases(&mut self, keys: &[Iova]) {
        let leases = keys.iter().map(|at| &self.held[at]);
        let leases = leases.filter(|held| held.is_lease() && held.phase == Phase::Live);
        let owners: BTreeSet<_> = leases.filter_map(|held| held.owner).collect();
        owners
            .into_iter()
            .for_each(|owner| self.readers.revoke(owner));
    }

    pub(super) fn check_leases(&self) {
        let leases = || self.held.values().filter(|held| held.is_lease());
        let here = leases().filter(|held| !held.is_retired());
        let here: LeaseTally = here.map(|held| held.granules).collect();
        assert_eq!(self.leases, here, "every lease counts once");
        for held in leases() {
            assert_eq!(held.visible, held.granules, "a lease is whole granules");
            assert!(held.owner.is_some(), "a lease is a session's");
        }
        for (session, attached) in &self.sessions {
            let own = leases().filter(|held| held.owner == Some(*session));
            let own: LeaseTally = own.map(|held| held.granules).collect();
            assert_eq!(attached.leases, own, "session {session} knows its leases");
        }
    }
}
