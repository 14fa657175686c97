//! Leases: bounce memory that this process divides up by itself.

use std::sync::Arc;

use domain_core::addr::{Iova, IovaRange};
use domain_core::lease::LeaseSpec;
use domain_core::mapping::MappingId;
use domaind_proto::v1;

use crate::error::{Error, Kept, ProtocolError};
use crate::mapping::checked_place;
use crate::session::{Inner, Session};
use crate::undo::{Guard, Undo};

/// A lease: whole granules of the bounce aperture, zeroed when they were given.
/// Dropping it releases it, in the background. Its bytes are read and written
/// through the [`Session`].
///
/// The daemon may take it away before: a reset of the bounce aperture ends all
/// leases, and zeroes them.
#[derive(Debug)]
#[must_use = "a dropped lease is released"]
pub struct Lease {
    id: MappingId,
    range: IovaRange,
    len_bytes: u64,
    guard: Guard,
}

impl Session {
    /// Leases a part of the bounce aperture, zeroed; all sessions of the domain
    /// see it. For drivers.
    ///
    /// If this is cancelled, what it leases is released again.
    ///
    /// # Errors
    /// [`Error::Refused`] with the daemon's reason, [`Error::Ended`],
    /// [`Error::Transport`].
    pub async fn lease(&self, spec: LeaseSpec) -> Result<Lease, Error> {
        let inner = Arc::clone(&self.inner);
        let work = async move { lease(&inner, &spec).await };
        self.inner.finish(work).await?
    }

    /// Releases a lease of this session by its parts ([`Lease::into_parts`]). Goes
    /// on if it is cancelled.
    ///
    /// # Errors
    /// As [`Lease::release`].
    pub async fn release(&self, iova: Iova, id: MappingId) -> Result<(), Error> {
        let inner = Arc::clone(&self.inner);
        let work = async move { release(&inner, iova, id).await };
        self.inner.finish(work).await?
    }
}

impl Lease {
    /// Its first address, a multiple of the granule. Never 0.
    #[must_use]
    pub fn iova(&self) -> Iova {
        self.range.start()
    }

    /// Its name in the domain, with the iova.
    #[must_use]
    pub fn id(&self) -> MappingId {
        self.id
    }

    /// All of it: whole granules.
    #[must_use]
    pub fn range(&self) -> IovaRange {
        self.range
    }

    /// Its length in bytes: a multiple of the granule, at least what was asked for.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// Gives it back, and waits until nobody can still use it. Goes on if it is
    /// cancelled.
    ///
    /// # Errors
    /// [`Kept`] gives it back. After [`Error::Refused`] it is as it was, unless
    /// the reason is `NOT_ACKNOWLEDGED`, or that there is no such mapping: then it
    /// has ended, and may be dropped. After [`Error::Transport`] it may have ended.
    pub async fn release(mut self) -> Result<(), Kept<Lease>> {
        let session = Arc::clone(self.guard.session());
        let in_need = self.unarmed();
        let inner = Arc::clone(&session);
        let work = async move {
            match release(&inner, self.iova(), self.id).await {
                Ok(()) => {
                    self.guard.disarm();
                    Ok(())
                }
                Err(error) => Err(Kept::new(self, error)),
            }
        };
        let finished = session.finish(work).await;
        finished.unwrap_or_else(|error| Err(Kept::new(in_need, error)))
    }

    /// Lets it live until the session ends, or somebody releases it by these parts
    /// ([`Session::release`]).
    #[must_use]
    pub fn into_parts(mut self) -> (Iova, MappingId) {
        self.guard.disarm();
        (self.iova(), self.id)
    }

    /// Guards what the daemon says it has leased, and checks that it is at least
    /// what was asked for.
    fn adopt(
        session: &Arc<Inner>,
        spec: &LeaseSpec,
        leased: v1::LeaseResponse,
    ) -> Result<Lease, Error> {
        let (iova, len_bytes) = (Iova::new(leased.iova), leased.len_bytes);
        let id = MappingId::new(leased.mapping_id);
        let guard = Guard::new(Arc::clone(session), Undo::Release { iova, id });
        let wanted = spec.place.len_bytes;
        if len_bytes < wanted {
            let got = len_bytes;
            return Err(ProtocolError::Place { iova, got, wanted }.into());
        }
        let range = checked_place(session.bounce(), iova, len_bytes, len_bytes)?;
        Ok(Lease {
            id,
            range,
            len_bytes,
            guard,
        })
    }

    /// The same lease in words only.
    fn unarmed(&self) -> Lease {
        Lease {
            guard: self.guard.unarmed(),
            ..*self
        }
    }
}

async fn lease(session: &Arc<Inner>, spec: &LeaseSpec) -> Result<Lease, Error> {
    let request = v1::LeaseRequest::from(spec);
    let answer = session.call(session.calls().lease(request)).await?;
    Lease::adopt(session, spec, answer)
}

async fn release(session: &Inner, iova: Iova, id: MappingId) -> Result<(), Error> {
    let request = v1::ReleaseRequest::from((iova, id));
    session.call(session.calls().release(request)).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;
    use crate::fake::{A_MOMENT, BOUNCE, FakeDaemon, PAGE, SOON};

    async fn released(fake: &FakeDaemon, count: usize) -> Vec<u64> {
        let there = async {
            loop {
                let released = fake.calls.released.lock().unwrap().clone();
                if released.len() >= count {
                    return released;
                }
                tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            }
        };
        timeout(SOON, there).await.unwrap()
    }

    #[tokio::test]
    async fn a_lease_is_whole_granules_and_is_released_once() {
        let fake = FakeDaemon::start().await;
        let lease = fake.session.lease(LeaseSpec::of(PAGE + 1)).await.unwrap();
        assert_eq!(lease.iova(), Iova::new(BOUNCE));
        assert_eq!(lease.len_bytes(), 2 * PAGE);
        let id = lease.id().get();

        lease.release().await.unwrap();

        assert_eq!(released(&fake, 1).await, [id]);
        tokio::time::sleep(A_MOMENT).await;
        assert_eq!(released(&fake, 1).await, [id], "and not when it is dropped");
    }

    #[tokio::test]
    async fn a_dropped_lease_and_one_that_nobody_learned_of_are_released() {
        let fake = FakeDaemon::start().await;
        let lease = fake.session.lease(LeaseSpec::of(1)).await.unwrap();
        let id = lease.id().get();
        drop(lease);
        assert_eq!(released(&fake, 1).await, [id]);

        *fake.calls.delay.lock().unwrap() = 2 * A_MOMENT;
        let cancelled = timeout(A_MOMENT, fake.session.lease(LeaseSpec::of(1))).await;
        assert!(cancelled.is_err());
        assert_eq!(released(&fake, 2).await.len(), 2);
    }

    #[tokio::test]
    async fn a_lease_that_is_shorter_than_asked_or_outside_is_refused_and_released() {
        let fake = FakeDaemon::start().await;
        let wrong = [
            (BOUNCE, PAGE),
            (BOUNCE + 3 * PAGE, 2 * PAGE),
            (BOUNCE - PAGE, 2 * PAGE),
            (u64::MAX, 2 * PAGE),
        ];
        for (place, (iova, len_bytes)) in wrong.into_iter().enumerate() {
            let answer = v1::LeaseResponse {
                mapping_id: 77,
                iova,
                len_bytes,
            };
            *fake.calls.lease_as.lock().unwrap() = Some(answer);
            let refused = fake.session.lease(LeaseSpec::of(PAGE + 1)).await;
            assert!(matches!(refused, Err(Error::Protocol(_))), "{refused:?}");
            assert_eq!(released(&fake, place + 1).await[place], 77);
        }
    }

    #[tokio::test]
    async fn a_full_aperture_refuses() {
        let fake = FakeDaemon::start().await;
        let all = fake.session.lease(LeaseSpec::of(4 * PAGE)).await.unwrap();
        let refused = fake.session.lease(LeaseSpec::of(1)).await.unwrap_err();
        assert_eq!(refused.reason(), v1::ErrorReason::NoSpace);
        all.release().await.unwrap();
        fake.session
            .lease(LeaseSpec::of(1))
            .await
            .unwrap()
            .release()
            .await
            .unwrap();
    }
}
