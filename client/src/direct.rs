//! The direct table of a domain, and what else its owner may do without a
//! session: reset, translate, look up.

use std::sync::Arc;

use domain_core::addr::IovaRange;
use domain_core::batch::BatchMode;
use domain_core::direct::{DirectMapping, DirectSpec, Removed, TableSet};
use domain_core::mapping::MappingView;
use domain_core::perm::Perm;
use domaind_proto::v1;
use domaind_proto::v1::map_direct_result::Outcome;
use tonic::{Response, Status};

use crate::answers;
use crate::answers::{BounceReset, Translation};
use crate::client::DomainCalls;
use crate::error::{Error, ProtocolError};
use crate::mapping::only;
use crate::session::{Inner, Session};

/// Entries of one message of a StreamSetMap. None takes more than 52 bytes, so
/// that a message stays below half of what the daemon takes.
const CHUNK_ENTRIES: usize = 2048;

/// How a direct table is replaced.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SetMapOptions {
    /// Only if the direct table has not changed since this generation, which
    /// [`TableSet::generation`] and `GetDomain` tell.
    pub expected_generation: Option<u64>,
    /// Names the request, in at most 64 bytes: repeated with the same id and
    /// table it is not done again, and gets the answer of the first time. For
    /// callers that try again after [`Error::Transport`]; empty means none.
    pub request_id: String,
}

impl Session {
    /// Enters registered memory in the domain without a bounce: devices work
    /// on the memory itself. For drivers, with memory of their own or of the
    /// domain.
    ///
    /// What comes back is no guard. A direct mapping lives until somebody ends
    /// it, or the session or domain ends that its memory belongs to; until then
    /// its memory stays registered, that of a dropped
    /// [`Buffer`](crate::Buffer), too. It has no name but its range, so that a
    /// guard that is dropped late would end whatever took its place.
    ///
    /// If this is cancelled, it is done or not, never in part;
    /// [`Session::lookup`] tells.
    ///
    /// # Errors
    /// [`Error::Refused`] (not whole granules, outside of the memory, something
    /// is there already, no hole fits, quota, more permission than the memory
    /// has), [`Error::Ended`], [`Error::Transport`].
    pub async fn map_direct(&self, spec: DirectSpec) -> Result<DirectMapping, Error> {
        self.way().map_direct(spec).await
    }

    /// Enters several pieces of memory with one call; one answer per entry, in
    /// order. At most [`BATCH_ENTRIES`](domain_core::limits::BATCH_ENTRIES).
    /// Cancelling as [`Session::map_direct`].
    ///
    /// # Errors
    /// As [`Session::map_direct`]; with [`BatchMode::AllOrNothing`] also if one
    /// entry was refused (`entry_index` in the metadata), and then nothing is
    /// mapped.
    pub async fn map_direct_batch(
        &self,
        specs: &[DirectSpec],
        mode: BatchMode,
    ) -> Result<Vec<Result<DirectMapping, Error>>, Error> {
        self.way().map_direct_batch(specs, mode).await
    }

    /// Ends every direct mapping that lies inside one of the ranges (at most
    /// [`BATCH_ENTRIES`](domain_core::limits::BATCH_ENTRIES)), whole mappings.
    /// If this is cancelled, all of it is done or nothing.
    ///
    /// # Errors
    /// [`Error::Refused`] for a range that would cut a mapping, one in which
    /// there is none (unless it is the whole space), ranges that overlap each
    /// other, another session's mapping; then nothing is ended.
    /// [`Error::Ended`], [`Error::Transport`].
    pub async fn unmap_direct(&self, ranges: &[IovaRange]) -> Result<Removed, Error> {
        self.way().unmap_direct(ranges).await
    }

    /// Replaces the whole direct table at once. What is in both tables never
    /// goes away in between. A table that is too long for one message goes as
    /// [`Session::stream_set_map`] would send it. If this is cancelled, the
    /// table is the old one or the new one.
    ///
    /// # Errors
    /// [`Error::Refused`]: what is wrong with which entry (`entry_index` in the
    /// metadata), a table that has changed since
    /// [`expected_generation`](SetMapOptions::expected_generation), another
    /// session's mappings in the old one. The old table stays.
    /// [`Error::Ended`], [`Error::Transport`].
    pub async fn set_map(
        &self,
        entries: &[DirectMapping],
        options: SetMapOptions,
    ) -> Result<TableSet, Error> {
        self.way().set_map(entries, options).await
    }

    /// As [`Session::set_map`], for entries that need not all be there before:
    /// the iterator is asked for them as they leave. If this is cancelled before
    /// all have left, the old table stays.
    ///
    /// # Errors
    /// As [`Session::set_map`].
    pub async fn stream_set_map<I>(
        &self,
        entries: I,
        options: SetMapOptions,
    ) -> Result<TableSet, Error>
    where
        I: IntoIterator<Item = DirectMapping, IntoIter: Send + 'static>,
    {
        self.way().stream_set_map(entries, options).await
    }

    /// Ends every direct mapping that overlaps one of the ranges, whole
    /// mappings. That there is none is no error. If this is cancelled, all of
    /// it is done or nothing.
    ///
    /// # Errors
    /// [`Error::Refused`] for another session's mapping; then nothing is
    /// ended. [`Error::Ended`], [`Error::Transport`].
    pub async fn clear_map(&self, ranges: &[IovaRange]) -> Result<Removed, Error> {
        self.way().clear_map(ranges).await
    }

    /// Takes back the whole bounce aperture, after a device reset: ends all
    /// streaming mappings and leases of all sessions, copies nothing back, zeroes
    /// the memory. Answers how many there were. A [`Mapping`](crate::Mapping) that
    /// was ended so cannot be unmapped any more, nor a [`Lease`](crate::Lease)
    /// released; both may be dropped. If this is cancelled, it may be done all
    /// the same.
    ///
    /// # Errors
    /// [`Error::Refused`] while there are streaming mappings or leases, unless
    /// `force` is set, and without a bounce aperture; [`Error::Ended`],
    /// [`Error::Transport`].
    pub async fn reset_bounce(&self, force: bool) -> Result<BounceReset, Error> {
        self.way().reset_bounce(force).await
    }

    /// Where the bytes of a range are: pieces that together cover it. For
    /// devices, too. Cancelling leaves nothing.
    ///
    /// # Errors
    /// [`Error::Refused`] at the first hole, and where less is allowed than
    /// wanted; [`Error::Ended`], [`Error::Transport`].
    pub async fn translate(&self, range: IovaRange, want: Perm) -> Result<Translation, Error> {
        self.way().translate(range, want).await
    }

    /// The lowest mapping that overlaps a range, whole. For devices, too.
    /// Cancelling leaves nothing.
    ///
    /// # Errors
    /// [`Error::Refused`] if there is none; [`Error::Ended`],
    /// [`Error::Transport`].
    pub async fn lookup(&self, range: IovaRange) -> Result<MappingView, Error> {
        self.way().lookup(range).await
    }

    /// To its own domain, which the token names.
    fn way(&self) -> Way {
        Way {
            calls: self.inner.calls(),
            domain: String::new(),
            session: Some(Arc::clone(&self.inner)),
        }
    }
}

/// On whose behalf a domain is asked and changed.
#[derive(Clone)]
pub(crate) struct Way {
    pub(crate) calls: DomainCalls,
    /// "domains/{domain}"; empty where the session says it.
    pub(crate) domain: String,
    /// `None`: the domain's owner, or the operator.
    pub(crate) session: Option<Arc<Inner>>,
}

impl Way {
    pub(crate) async fn map_direct(self, spec: DirectSpec) -> Result<DirectMapping, Error> {
        // For one entry both modes are the same; this one's refusal does not
        // begin with "entry 0".
        let answers = self.map_direct_batch(&[spec], BatchMode::Partial).await?;
        only(answers)?
    }

    pub(crate) async fn map_direct_batch(
        mut self,
        specs: &[DirectSpec],
        mode: BatchMode,
    ) -> Result<Vec<Result<DirectMapping, Error>>, Error> {
        let request = v1::MapDirectRequest {
            domain: self.domain.clone(),
            entries: specs.iter().map(Into::into).collect(),
            partial: mode == BatchMode::Partial,
            request_id: String::new(),
        };
        let answer = self.calls.map_direct(request);
        let results = wait(self.session.as_deref(), answer).await?.results;
        let (got, wanted) = (results.len(), specs.len());
        if got != wanted {
            return Err(ProtocolError::AnswerCount { got, wanted }.into());
        }
        let pairs = specs.iter().zip(results);
        Ok(pairs
            .map(|(spec, result)| entered(spec, result.outcome))
            .collect())
    }

    pub(crate) async fn unmap_direct(mut self, ranges: &[IovaRange]) -> Result<Removed, Error> {
        let request = v1::UnmapDirectRequest {
            domain: self.domain.clone(),
            ranges: wire_ranges(ranges),
            request_id: String::new(),
        };
        let answer = self.calls.unmap_direct(request);
        let removed = wait(self.session.as_deref(), answer).await?;
        Ok(Removed {
            mappings: removed.unmapped_mappings,
            bytes: removed.unmapped_bytes,
        })
    }

    pub(crate) async fn set_map(
        mut self,
        entries: &[DirectMapping],
        options: SetMapOptions,
    ) -> Result<TableSet, Error> {
        if entries.len() > CHUNK_ENTRIES {
            return self.stream_set_map(entries.to_vec(), options).await;
        }
        let request = v1::SetMapRequest {
            domain: self.domain.clone(),
            entries: entries.iter().map(Into::into).collect(),
            expected_generation: options.expected_generation,
            request_id: options.request_id,
        };
        let answer = self.calls.set_map(request);
        let set = wait(self.session.as_deref(), answer).await?;
        Ok(answers::table_set(&set)?)
    }

    pub(crate) async fn stream_set_map<I>(
        mut self,
        entries: I,
        options: SetMapOptions,
    ) -> Result<TableSet, Error>
    where
        I: IntoIterator<Item = DirectMapping, IntoIter: Send + 'static>,
    {
        let header = v1::SetMapHeader {
            domain: self.domain.clone(),
            expected_generation: options.expected_generation,
            request_id: options.request_id,
        };
        let messages = tokio_stream::iter(Messages::new(header, entries.into_iter()));
        let answer = self.calls.stream_set_map(messages);
        let outcome = wait(self.session.as_deref(), answer).await?.outcome;
        let set = outcome.ok_or(ProtocolError::Missing { field: "outcome" })?;
        Ok(answers::table_set(&set)?)
    }

    pub(crate) async fn clear_map(mut self, ranges: &[IovaRange]) -> Result<Removed, Error> {
        let request = v1::ClearMapRequest {
            domain: self.domain.clone(),
            ranges: wire_ranges(ranges),
            request_id: String::new(),
        };
        let answer = self.calls.clear_map(request);
        let removed = wait(self.session.as_deref(), answer).await?;
        Ok(Removed {
            mappings: removed.removed_mappings,
            bytes: removed.removed_bytes,
        })
    }

    pub(crate) async fn reset_bounce(mut self, force: bool) -> Result<BounceReset, Error> {
        let request = v1::ResetBounceRequest {
            domain: self.domain.clone(),
            force,
            request_id: String::new(),
        };
        let answer = self.calls.reset_bounce(request);
        let reset = wait(self.session.as_deref(), answer).await?;
        Ok(BounceReset {
            mappings: reset.ended_mappings,
            leases: reset.ended_leases,
        })
    }

    pub(crate) async fn translate(
        mut self,
        range: IovaRange,
        want: Perm,
    ) -> Result<Translation, Error> {
        let request = v1::TranslateRequest {
            domain: self.domain.clone(),
            range: Some(range.into()),
            want: v1::Perm::from(want).into(),
        };
        let answer = self.calls.translate(request);
        let translated = wait(self.session.as_deref(), answer).await?;
        Ok(answers::translation(range, &translated)?)
    }

    pub(crate) async fn lookup(mut self, range: IovaRange) -> Result<MappingView, Error> {
        let request = v1::LookupRequest {
            domain: self.domain.clone(),
            range: Some(range.into()),
        };
        let answer = self.calls.lookup(request);
        let mapping = wait(self.session.as_deref(), answer).await?;
        Ok(answers::mapping(&mapping)?)
    }
}

/// What the daemon answers; for a session not past the session's end.
async fn wait<T>(
    session: Option<&Inner>,
    answer: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, Error> {
    match session {
        Some(session) => session.call(answer).await,
        None => Ok(answer.await?.into_inner()),
    }
}

/// What became of one entry, if it is an answer to it.
fn entered(spec: &DirectSpec, outcome: Option<Outcome>) -> Result<DirectMapping, Error> {
    match outcome {
        Some(Outcome::Mapping(mapped)) => Ok(answers::entered(spec, &mapped)?),
        Some(Outcome::Refusal(refusal)) => Err(Error::Refused(refusal)),
        None => Err(ProtocolError::Missing { field: "outcome" }.into()),
    }
}

fn wire_ranges(ranges: &[IovaRange]) -> Vec<v1::IovaRange> {
    ranges.iter().copied().map(Into::into).collect()
}

/// The messages of one StreamSetMap: a header, chunks of entries, a commit.
struct Messages<I> {
    /// Until it has left.
    header: Option<v1::SetMapHeader>,
    entries: I,
    committed: bool,
}

impl<I> Messages<I> {
    fn new(header: v1::SetMapHeader, entries: I) -> Messages<I> {
        Messages {
            header: Some(header),
            entries,
            committed: false,
        }
    }
}

impl<I: Iterator<Item = DirectMapping>> Iterator for Messages<I> {
    type Item = v1::StreamSetMapRequest;

    fn next(&mut self) -> Option<v1::StreamSetMapRequest> {
        if self.committed {
            return None;
        }
        let chunk = self.entries.by_ref().take(CHUNK_ENTRIES);
        let entries: Vec<_> = chunk.map(|entry| (&entry).into()).collect();
        self.committed = entries.len() < CHUNK_ENTRIES;
        Some(v1::StreamSetMapRequest {
            header: self.header.take(),
            entries,
            commit: self.committed,
        })
    }
}

#[cfg(test)]
mod tests {
    use domain_core::addr::Iova;
    use domain_core::direct::Placement;
    use domain_core::limits::REQUEST_BYTES;
    use domain_core::memory::MemoryId;
    use prost::Message;
    use tonic::Code;

    use super::*;
    use crate::fake::{FakeDaemon, PAGE};

    /// The longest that an entry can be on the wire.
    const LONGEST: u64 = u64::MAX;

    fn entry(number: u64) -> DirectMapping {
        DirectMapping {
            range: IovaRange::from_len(Iova::new((number + 1) * PAGE), PAGE).unwrap(),
            memory: MemoryId::new(1),
            offset: 0,
            perm: Perm::Read,
        }
    }

    fn messages(count: u64) -> Vec<v1::StreamSetMapRequest> {
        let header = v1::SetMapHeader {
            expected_generation: Some(7),
            ..v1::SetMapHeader::default()
        };
        Messages::new(header, (0..count).map(entry)).collect()
    }

    #[test]
    fn a_table_travels_as_a_header_chunks_and_one_commit() {
        let chunk = CHUNK_ENTRIES as u64;
        for count in [0, 1, chunk - 1, chunk, chunk + 1, 3 * chunk] {
            let messages = messages(count);

            let sent = messages.iter().flat_map(|message| &message.entries);
            assert!(
                sent.cloned()
                    .eq((0..count).map(|number| (&entry(number)).into()))
            );
            let headers = messages.iter().map(|message| message.header.is_some());
            assert!(headers.eq((0..messages.len()).map(|place| place == 0)));
            let commits = messages.iter().map(|message| message.commit);
            assert!(commits.eq((1..=messages.len()).map(|place| place == messages.len())));
        }
    }

    #[test]
    fn a_full_chunk_is_well_below_what_the_daemon_takes() {
        let longest = DirectMapping {
            range: IovaRange::new(Iova::new(LONGEST - 1), Iova::new(LONGEST)).unwrap(),
            memory: MemoryId::new(LONGEST),
            offset: LONGEST,
            perm: Perm::ReadWrite,
        };
        let entries = vec![v1::DirectMapping::from(&longest); CHUNK_ENTRIES];
        let message = v1::StreamSetMapRequest {
            entries,
            ..v1::StreamSetMapRequest::default()
        };
        assert!(message.encoded_len() < REQUEST_BYTES / 2);
    }

    #[tokio::test]
    async fn a_table_is_streamed_with_its_options_and_the_answer_comes_back() {
        let fake = FakeDaemon::start().await;
        let options = SetMapOptions {
            expected_generation: Some(6),
            request_id: "once".to_owned(),
        };
        let count = CHUNK_ENTRIES as u64 + 1;

        let entries: Vec<_> = (0..count).map(entry).collect();
        let streamed = fake
            .session
            .stream_set_map(entries.clone(), options.clone());
        let streamed = streamed.await.unwrap();
        // Too long for one message, and so it is not the unary call.
        let set = fake.session.set_map(&entries, options).await.unwrap();

        let answer = |set: TableSet| (set.generation, set.added, set.removed);
        assert_eq!(answer(streamed), (7, 2049, 0));
        assert_eq!(set, streamed);
        for header in fake.calls.headers.lock().unwrap().iter() {
            assert_eq!(header.expected_generation, Some(6));
            assert_eq!(header.request_id, "once");
        }
    }

    #[tokio::test]
    async fn a_direct_mapping_is_checked_against_what_was_asked() {
        let fake = FakeDaemon::start().await;
        let at = |iova| DirectSpec {
            memory: MemoryId::new(1),
            offset: 0,
            len_bytes: PAGE,
            perm: Perm::Read,
            placement: Placement::At(Iova::new(iova)),
        };

        let mapped = fake.session.map_direct(at(PAGE)).await.unwrap();
        assert_eq!(mapped, entry(0));

        // The fake answers with the same entry whatever it is asked.
        let broken = fake.session.map_direct(at(2 * PAGE)).await.unwrap_err();
        assert_eq!(broken.code(), Some(Code::Internal), "{broken}");
    }
}
