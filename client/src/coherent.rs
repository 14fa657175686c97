//! Coherent memory: zeroed, and seen by all sessions all the time.

use std::sync::Arc;

use domain_core::addr::{Iova, IovaRange};
use domain_core::coherent::CoherentSpec;
use domain_core::mapping::MappingId;
use domaind_proto::v1;

use crate::error::{Error, Kept};
use crate::mapping::checked_place;
use crate::session::{Inner, Session};
use crate::undo::{Guard, Undo};

/// A coherent allocation. Dropping it frees it, in the background, unless it
/// is persistent. Its bytes are read and written through the [`Session`].
#[derive(Debug)]
#[must_use = "dropped coherent memory is freed, unless it is persistent"]
pub struct Coherent {
    id: MappingId,
    range: IovaRange,
    len_bytes: u64,
    persistent: bool,
    guard: Guard,
}

impl Session {
    /// Allocates zeroed memory that all sessions of the domain see. For
    /// drivers.
    ///
    /// If this is cancelled, what it allocates is freed again, the persistent
    /// included; it is not if the session ends at once.
    ///
    /// # Errors
    /// [`Error::Refused`] with the daemon's reason, [`Error::Ended`],
    /// [`Error::Transport`].
    pub async fn alloc_coherent(&self, spec: CoherentSpec) -> Result<Coherent, Error> {
        let inner = Arc::clone(&self.inner);
        let work = async move { alloc(&inner, &spec).await };
        let mut coherent = self.inner.finish(work).await??;
        if coherent.persistent {
            coherent.guard.disarm();
        }
        Ok(coherent)
    }

    /// Frees coherent memory by its parts ([`Coherent::into_parts`]): that of
    /// this session, and persistent memory, whoever allocated it. Goes on if
    /// it is cancelled.
    ///
    /// # Errors
    /// [`Error::Refused`] (not found, not yours), and nothing is freed;
    /// [`Error::Ended`], [`Error::Transport`].
    pub async fn free_coherent(&self, iova: Iova, id: MappingId) -> Result<(), Error> {
        let inner = Arc::clone(&self.inner);
        let work = async move { free(&inner, iova, id).await };
        self.inner.finish(work).await?
    }
}

impl Coherent {
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

    /// Exactly the bytes that were asked for.
    #[must_use]
    pub fn range(&self) -> IovaRange {
        self.range
    }

    /// Length in bytes, as asked.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// Whether it belongs to the domain, and stays when this is dropped.
    #[must_use]
    pub fn is_persistent(&self) -> bool {
        self.persistent
    }

    /// Frees it, the persistent too. Goes on if it is cancelled.
    ///
    /// # Errors
    /// [`Kept`] gives it back. After [`Error::Refused`] it is as it was; after
    /// [`Error::Transport`] it may be free.
    pub async fn free(mut self) -> Result<(), Kept<Coherent>> {
        let session = Arc::clone(self.guard.session());
        let in_need = self.unarmed();
        let inner = Arc::clone(&session);
        let work = async move {
            match free(&inner, self.iova(), self.id).await {
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

    /// Lets it live until the session ends (the persistent: for ever), or
    /// somebody frees it by these parts ([`Session::free_coherent`]).
    #[must_use]
    pub fn into_parts(mut self) -> (Iova, MappingId) {
        self.guard.disarm();
        (self.iova(), self.id)
    }

    /// Guards what the daemon says it has allocated, and checks that it is
    /// what was asked for.
    fn adopt(
        session: &Arc<Inner>,
        spec: &CoherentSpec,
        allocated: v1::AllocCoherentResponse,
    ) -> Result<Coherent, Error> {
        let iova = Iova::new(allocated.iova);
        let id = MappingId::new(allocated.mapping_id);
        let guard = Guard::new(Arc::clone(session), Undo::Free { iova, id });
        let wanted = spec.place.len_bytes;
        let range = checked_place(session.coherent(), iova, allocated.len_bytes, wanted)?;
        Ok(Coherent {
            id,
            range,
            len_bytes: wanted,
            persistent: spec.persistent,
            guard,
        })
    }

    /// The same allocation in words only.
    fn unarmed(&self) -> Coherent {
        Coherent {
            guard: self.guard.unarmed(),
            ..*self
        }
    }
}

async fn alloc(session: &Arc<Inner>, spec: &CoherentSpec) -> Result<Coherent, Error> {
    let request = v1::AllocCoherentRequest::from(spec);
    let answer = session
        .call(session.calls().alloc_coherent(request))
        .await?;
    Coherent::adopt(session, spec, answer)
}

async fn free(session: &Inner, iova: Iova, id: MappingId) -> Result<(), Error> {
    let request = v1::FreeCoherentRequest::from((iova, id));
    session.call(session.calls().free_coherent(request)).await?;
    Ok(())
}
