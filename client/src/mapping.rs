//! Streaming mappings: one transfer of one buffer.

use std::sync::Arc;

use domain_core::addr::{Iova, IovaRange};
use domain_core::batch::BatchMode;
use domain_core::mapping::MappingId;
use domain_core::perm::Direction;
use domain_core::streaming::{MapSpec, SyncSpec, SyncTarget, UnmapSpec};
use domaind_proto::v1;
use domaind_proto::v1::map_result::Outcome;

use crate::error::{Error, Kept, ProtocolError};
use crate::session::{Inner, Session};
use crate::undo::{Guard, Undo};

/// A live streaming mapping. Dropping it unmaps without copying back, in the
/// background; [`Mapping::unmap`] copies back.
#[derive(Debug)]
#[must_use = "a dropped mapping is unmapped, and nothing flows back"]
pub struct Mapping {
    id: MappingId,
    range: IovaRange,
    len_bytes: u64,
    direction: Direction,
    guard: Guard,
}

impl Session {
    /// Bounces a buffer of registered memory: the daemon copies it in as the
    /// direction says, and shows it in the domain. For drivers.
    ///
    /// If this is cancelled, what it maps is unmapped again.
    ///
    /// # Errors
    /// [`Error::Refused`] with the daemon's reason, [`Error::Ended`],
    /// [`Error::Transport`].
    pub async fn map(&self, spec: MapSpec) -> Result<Mapping, Error> {
        let inner = Arc::clone(&self.inner);
        let work = async move { map_one(&inner, &spec).await };
        self.inner.finish(work).await?
    }

    /// Maps several buffers with one call; one answer per entry, in order.
    /// At most [`BATCH_ENTRIES`](domain_core::limits::BATCH_ENTRIES).
    ///
    /// If this is cancelled, what it maps is unmapped again.
    ///
    /// # Errors
    /// As [`Session::map`]; with [`BatchMode::AllOrNothing`] also if one entry
    /// was refused (`entry_index` in the metadata), and then nothing is
    /// mapped.
    pub async fn map_batch(
        &self,
        specs: &[MapSpec],
        mode: BatchMode,
    ) -> Result<Vec<Result<Mapping, Error>>, Error> {
        let (inner, specs) = (Arc::clone(&self.inner), specs.to_vec());
        let work = async move { map_all(&inner, &specs, mode).await };
        self.inner.finish(work).await?
    }

    /// Ends a mapping by its parts ([`Mapping::into_parts`]), and says how
    /// many bytes were copied back. Goes on if it is cancelled.
    ///
    /// # Errors
    /// As [`Mapping::unmap`]. After [`Error::Refused`] the mapping is as it
    /// was.
    pub async fn unmap(&self, spec: UnmapSpec) -> Result<u64, Error> {
        let inner = Arc::clone(&self.inner);
        let work = async move { unmap_one(&inner, &spec).await };
        self.inner.finish(work).await?
    }
}

impl Mapping {
    /// Where the first byte of the buffer appears in the domain. Never 0.
    #[must_use]
    pub fn iova(&self) -> Iova {
        self.range.start()
    }

    /// Its name in the domain, with the iova.
    #[must_use]
    pub fn id(&self) -> MappingId {
        self.id
    }

    /// What is visible, exact to the byte.
    #[must_use]
    pub fn range(&self) -> IovaRange {
        self.range
    }

    /// Length in bytes, as asked.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// Which way bytes travel.
    #[must_use]
    pub fn direction(&self) -> Direction {
        self.direction
    }

    /// Copies back as the direction says, ends the mapping, and returns how
    /// many bytes flowed back.
    ///
    /// `written_bytes` is how many bytes the device wrote, from the start of
    /// the buffer. Required for `FROM_DEVICE` (unless it was mapped with
    /// `preserve` or `skip_sync`), optional for `BIDIRECTIONAL` (where `None`
    /// means all), refused otherwise.
    ///
    /// If this is cancelled it goes on, and if it then fails the mapping is
    /// unmapped as by dropping.
    ///
    /// # Errors
    /// [`Kept`] gives the mapping back. After [`Error::Refused`] it is as it
    /// was (a wrong `written_bytes`, or the file could not be written): the
    /// bytes that the device wrote are still in the domain, and it can be
    /// tried again. After [`Error::Transport`] it may have ended.
    pub async fn unmap(mut self, written_bytes: Option<u64>) -> Result<u64, Kept<Mapping>> {
        let session = Arc::clone(self.guard.session());
        let in_need = self.unarmed();
        let inner = Arc::clone(&session);
        let work = async move {
            let spec = UnmapSpec {
                iova: self.iova(),
                id: self.id,
                written_bytes,
                skip_sync: false,
            };
            match unmap_one(&inner, &spec).await {
                Ok(copied_bytes) => {
                    self.guard.disarm();
                    Ok(copied_bytes)
                }
                Err(error) => Err(Kept::new(self, error)),
            }
        };
        let finished = session.finish(work).await;
        finished.unwrap_or_else(|error| Err(Kept::new(in_need, error)))
    }

    /// Copies a part from the domain to the driver's buffer: the driver sees
    /// what the device wrote. If it is cancelled, the part may be copied or
    /// not.
    ///
    /// # Errors
    /// [`Error::Refused`] (outside of the mapping, nothing to sync that way,
    /// the file could not be written), [`Error::Ended`], [`Error::Transport`].
    pub async fn sync_for_cpu(&self, offset: u64, len_bytes: u64) -> Result<(), Error> {
        self.sync(offset, len_bytes, SyncTarget::ForCpu).await
    }

    /// Copies a part from the driver's buffer to the domain: the device sees
    /// what the driver wrote. If it is cancelled, the part may be copied or
    /// not.
    ///
    /// # Errors
    /// As [`Mapping::sync_for_cpu`].
    pub async fn sync_for_device(&self, offset: u64, len_bytes: u64) -> Result<(), Error> {
        self.sync(offset, len_bytes, SyncTarget::ForDevice).await
    }

    /// Lets the mapping live until the session ends or somebody ends it by
    /// these parts ([`Session::unmap`]).
    #[must_use]
    pub fn into_parts(mut self) -> (Iova, MappingId) {
        self.guard.disarm();
        (self.iova(), self.id)
    }

    async fn sync(&self, offset: u64, len_bytes: u64, target: SyncTarget) -> Result<(), Error> {
        let entry = v1::SyncEntry::from(&SyncSpec {
            iova: self.iova(),
            id: self.id,
            offset,
            len_bytes,
            target,
        });
        let request = v1::SyncRequest {
            entries: vec![entry],
            partial: false,
            request_id: String::new(),
        };
        let session = self.guard.session();
        let response = session.call(session.calls().sync(request)).await?;
        match only(response.results)?.refusal {
            Some(refusal) => Err(Error::Refused(refusal)),
            None => Ok(()),
        }
    }

    /// What came of one buffer.
    fn answered(
        session: &Arc<Inner>,
        spec: &MapSpec,
        result: v1::MapResult,
    ) -> Result<Mapping, Error> {
        match result.outcome {
            Some(Outcome::Mapping(mapped)) => Mapping::adopt(session, spec, mapped),
            Some(Outcome::Refusal(refusal)) => Err(Error::Refused(refusal)),
            None => Err(ProtocolError::Missing { field: "outcome" }.into()),
        }
    }

    /// Guards what the daemon says it has mapped, and checks that it is what
    /// was asked for.
    fn adopt(
        session: &Arc<Inner>,
        spec: &MapSpec,
        mapped: v1::StreamingMapping,
    ) -> Result<Mapping, Error> {
        let (iova, id) = (Iova::new(mapped.iova), MappingId::new(mapped.mapping_id));
        let guard = Guard::new(Arc::clone(session), Undo::Unmap { iova, id });
        let range = checked_place(session.bounce(), iova, mapped.len_bytes, spec.len_bytes)?;
        Ok(Mapping {
            id,
            range,
            len_bytes: spec.len_bytes,
            direction: spec.direction,
            guard,
        })
    }

    /// The same mapping in words only.
    fn unarmed(&self) -> Mapping {
        Mapping {
            guard: self.guard.unarmed(),
            ..*self
        }
    }
}

/// The range that begins at `iova`, if it has the length that was wanted and
/// lies in the aperture.
pub(crate) fn checked_place(
    aperture: Option<IovaRange>,
    iova: Iova,
    got: u64,
    wanted: u64,
) -> Result<IovaRange, ProtocolError> {
    IovaRange::from_len(iova, got)
        .ok()
        .filter(|range| got == wanted && aperture.is_some_and(|whole| whole.contains(*range)))
        .ok_or(ProtocolError::Place { iova, got, wanted })
}

async fn map_all(
    session: &Arc<Inner>,
    specs: &[MapSpec],
    mode: BatchMode,
) -> Result<Vec<Result<Mapping, Error>>, Error> {
    let request = v1::MapRequest {
        entries: specs.iter().map(Into::into).collect(),
        partial: mode == BatchMode::Partial,
        request_id: String::new(),
    };
    let results = session.call(session.calls().map(request)).await?.results;
    let got = results.len();
    let mappings: Vec<_> = results
        .into_iter()
        .zip(specs)
        .map(|(result, spec)| Mapping::answered(session, spec, result))
        .collect();
    if got != specs.len() {
        let wanted = specs.len();
        return Err(ProtocolError::AnswerCount { got, wanted }.into());
    }
    Ok(mappings)
}

/// As `map_all`, without lists of one.
async fn map_one(session: &Arc<Inner>, spec: &MapSpec) -> Result<Mapping, Error> {
    let request = v1::MapRequest {
        entries: vec![spec.into()],
        partial: false,
        request_id: String::new(),
    };
    let results = session.call(session.calls().map(request)).await?.results;
    let got = results.len();
    let mut mappings = results
        .into_iter()
        .map(|result| Mapping::answered(session, spec, result));
    // What nobody has asked for is dropped, and so undone.
    match (mappings.next(), mappings.count()) {
        (Some(mapping), 0) => mapping,
        _ => Err(ProtocolError::AnswerCount { got, wanted: 1 }.into()),
    }
}

async fn unmap_one(session: &Inner, spec: &UnmapSpec) -> Result<u64, Error> {
    let request = v1::UnmapRequest {
        entries: vec![spec.into()],
        partial: false,
        request_id: String::new(),
    };
    let response = session.call(session.calls().unmap(request)).await?;
    let result = only(response.results)?;
    match result.refusal {
        Some(refusal) => Err(Error::Refused(refusal)),
        None => Ok(result.copied_bytes),
    }
}

/// The one answer to one entry.
pub(crate) fn only<T>(answers: Vec<T>) -> Result<T, ProtocolError> {
    let got = answers.len();
    let mut answers = answers.into_iter();
    match (answers.next(), answers.next()) {
        (Some(answer), None) => Ok(answer),
        _ => Err(ProtocolError::AnswerCount { got, wanted: 1 }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_must_be_as_long_as_asked_and_lie_in_the_aperture() {
        let aperture = IovaRange::from_len(Iova::new(0x1000), 0x1000).ok();
        let place = |iova, got, wanted| checked_place(aperture, Iova::new(iova), got, wanted);

        assert!(place(0x1000, 0x1000, 0x1000).is_ok());
        assert!(place(0x1fff, 1, 1).is_ok());
        assert!(place(0x1000, 1, 2).is_err(), "shorter than asked");
        assert!(place(0x1fff, 2, 2).is_err(), "reaches behind the aperture");
        assert!(place(0xfff, 1, 1).is_err() && place(u64::MAX, 2, 2).is_err());
        assert!(place(0x1000, 0, 0).is_err());
        assert!(checked_place(None, Iova::new(0x1000), 1, 1).is_err());
    }
}
