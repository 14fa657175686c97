//! Leases in the model.

use super::*;

impl Model {
    pub(super) fn is_lease(&self, id: MappingId) -> bool {
        self.held.iter().any(|held| held.id == id && held.is_lease)
    }

    /// Leases of one session, or all.
    pub(super) fn leases_held(&self, owner: Option<SessionId>) -> LeaseTally {
        let leases = self.held.iter().filter(|held| held.is_lease);
        let leases = leases.filter(|held| owner.is_none() || held.owner == owner);
        leases.map(|held| held.visible).collect()
    }

    /// What counts against a session's quotas of leases.
    fn leases_charged(&self, session: SessionId) -> LeaseTally {
        let held = self.leases_held(Some(session));
        let gone = self.gone.iter();
        let gone = gone.filter(|one| one.lease_of == Some(session));
        gone.fold(held, |sum, one| LeaseTally {
            count: sum.count + 1,
            bytes: sum.bytes + one.aperture_bytes(),
        })
    }

    fn lease_places(&self, session: SessionId, spec: &LeaseSpec) -> Result<Vec<u64>, LeaseError> {
        self.driver(session)?;
        Self::room(Quota::Mappings, QUOTAS.mappings, self.charged(session))?;
        let charged = self.leases_charged(session);
        Self::room(Quota::Leases, QUOTAS.leases, charged.count)?;
        let (limit, used) = (QUOTAS.lease_bytes, charged.bytes);
        match spec.place.len_bytes.checked_next_multiple_of(P) {
            Some(want) if used + want > limit => {
                Err(LeaseBytesExceeded { limit, used, want }.into())
            }
            _ => Ok(self.fits(self.bounce_pages(), spec.place)?),
        }
    }

    pub(super) fn lease(&mut self, session: SessionId, spec: &LeaseSpec) {
        let expected = self.lease_places(session, spec);
        let answer = self.domain.lease(session, spec);
        assert_eq!(answer.as_ref().err(), expected.as_ref().err(), "{spec:?}");
        let (Ok(made), Ok(pages)) = (answer, expected) else {
            return;
        };
        let len_bytes = spec.place.len_bytes.next_multiple_of(P);
        let whole = |page| IovaRange::from_len(Iova::new(page * P), len_bytes);
        let is_right = pages.iter().any(|page| whole(*page) == Ok(made.range));
        assert!(is_right, "{made:?}");
        let mut held = ModelHeld {
            id: made.id,
            owner: Some(session),
            visible: made.range,
            spec: None,
            is_lease: true,
            made: self.clock,
        };
        self.learn(&mut held, made.id);
        self.fill(&held);
        self.held.push(held);
    }

    pub(super) fn release(&mut self, session: SessionId, iova: Iova, id: MappingId) {
        let expected = (|| {
            self.driver(session)?;
            // What is no lease is none, whoever owns it.
            if !self.is_lease(id) {
                return Err(MappingMissing::NoSuchMapping { iova, id }.into());
            }
            let held = self.named(session, iova, id);
            held.map(|_| ()).map_err(ReleaseError::Missing)
        })();
        let released = self.domain.release_lease(session, iova, id);
        assert_eq!(released.map(drop), expected);
        if expected.is_ok() {
            let at = self.held.iter().position(|held| held.id == id).unwrap();
            let released = self.held.remove(at);
            let gone = Gone::aperture(&released, true);
            self.removed(vec![gone], &[], Some(session));
        }
    }
}
