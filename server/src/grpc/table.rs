//! StreamSetMap: a direct table that comes in pieces.
//!
//! What has come is kept parsed, at most as many entries as the domain may have,
//! for at most as long as any call may take, for at most so many callers, none
//! of which may be silent for long. The domain is not touched before the stream
//! has come to its end.

use std::time::Duration;

use domain_core::direct::{DirectMapping, SetMapError};
use domaind_proto::convert;
use domaind_proto::v1::{self, ErrorReason, Refusal};
use tokio::time::timeout;
use tokio_stream::{Stream, StreamExt};
use tonic::{Code, Status};

use crate::queue::{Place, Queued};
use crate::replay::{Fingerprint, Fingerprinting};

/// How long a stream may leave us waiting for its next message, or its end: who
/// says nothing shall not keep a place. Our own clients send a table as fast as
/// we read it.
const SILENCE_LIMIT: Duration = Duration::from_secs(3);

/// A table that was streamed in, complete.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) header: v1::SetMapHeader,
    pub(super) mappings: Vec<DirectMapping>,
    /// Of header and entries, whichever chunks they came in.
    pub(super) fingerprint: Fingerprint,
}

/// A table that is being streamed in.
#[derive(Debug)]
struct Growing {
    table: Table,
    /// `None` for a request without an id.
    fingerprinting: Option<Fingerprinting>,
    /// Entries that the domain may have.
    limit: u32,
    is_complete: bool,
}

/// Reads a whole table, and says with which place: it is taken when the first
/// message has come. `limit_of` says how many entries its domain may have.
/// Cancelling drops what has come and gives the place back.
///
/// # Errors
/// A refusal as soon as something is wrong; `DEADLINE_EXCEEDED` for a silence.
pub(super) async fn receive(
    mut pieces: impl Stream<Item = Result<v1::StreamSetMapRequest, Status>> + Unpin,
    limit_of: impl FnOnce(&v1::SetMapHeader) -> Result<u32, Refusal>,
    queued: Queued,
) -> Result<(Table, Place), Status> {
    let first = next(&mut pieces).await?.unwrap_or_default();
    let mut growing = Growing::begin(first, limit_of)?;
    let place = queued.place().await;
    while let Some(piece) = next(&mut pieces).await? {
        if piece.header.is_some() {
            return Err(malformed("a second header").into());
        }
        growing.add(&piece.entries, piece.commit)?;
    }
    Ok((growing.finish()?, place))
}

/// The next message; `None` at the end. Cancel safe.
async fn next(
    pieces: &mut (impl Stream<Item = Result<v1::StreamSetMapRequest, Status>> + Unpin),
) -> Result<Option<v1::StreamSetMapRequest>, Status> {
    match timeout(SILENCE_LIMIT, pieces.next()).await {
        Ok(piece) => piece.transpose(),
        Err(_) => {
            let message = format!("the stream said nothing within {SILENCE_LIMIT:?}");
            Err(Status::deadline_exceeded(message))
        }
    }
}

impl Growing {
    /// Takes the first message apart, so that only what is parsed of it waits.
    fn begin(
        first: v1::StreamSetMapRequest,
        limit_of: impl FnOnce(&v1::SetMapHeader) -> Result<u32, Refusal>,
    ) -> Result<Growing, Refusal> {
        let header = first
            .header
            .ok_or_else(|| malformed("the first message has no header"))?;
        convert::request_id(&header.request_id)?;
        let mut growing = Growing::new(limit_of(&header)?, header);
        growing.add(&first.entries, first.commit)?;
        Ok(growing)
    }

    fn new(limit: u32, header: v1::SetMapHeader) -> Growing {
        let fingerprinting = Fingerprinting::new(&header);
        Growing {
            fingerprinting: (!header.request_id.is_empty()).then(|| fingerprinting.clone()),
            table: Table {
                header,
                mappings: Vec::new(),
                fingerprint: fingerprinting.finish(),
            },
            limit,
            is_complete: false,
        }
    }

    fn add(&mut self, entries: &[v1::DirectMapping], commit: bool) -> Result<(), Refusal> {
        if self.is_complete {
            return Err(malformed("a message after the commit"));
        }
        let mappings = &mut self.table.mappings;
        let asked = mappings.len() + entries.len();
        if asked > usize::try_from(self.limit).unwrap_or(usize::MAX) {
            let limit = self.limit;
            return Err(SetMapError::TooMany { asked, limit }.into());
        }
        mappings.extend(convert::direct_mappings(entries, mappings.len())?);
        if let Some(fingerprinting) = &mut self.fingerprinting {
            entries.iter().for_each(|entry| fingerprinting.add(entry));
        }
        self.is_complete = commit;
        Ok(())
    }

    fn finish(self) -> Result<Table, Refusal> {
        if !self.is_complete {
            return Err(malformed("the stream ended without a commit"));
        }
        let mut table = self.table;
        if let Some(fingerprinting) = self.fingerprinting {
            table.fingerprint = fingerprinting.finish();
        }
        Ok(table)
    }
}

fn malformed(message: &str) -> Refusal {
    Refusal::because(Code::InvalidArgument, ErrorReason::Malformed, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::queue::Queue;
    use crate::tenant::Tenant;
    use domain_core::limits::{DIRECT_PER_DOMAIN, TABLE_STREAMS, TABLE_STREAMS_PER_USER};
    use tokio::time::Instant;

    /// The only table that is on its way.
    fn queued() -> Queued {
        Queue::of_table_streams().enter(Tenant::user(1)).unwrap()
    }

    fn header(request_id: &str) -> Option<v1::SetMapHeader> {
        Some(v1::SetMapHeader {
            domain: "domains/d".to_owned(),
            request_id: request_id.to_owned(),
            ..v1::SetMapHeader::default()
        })
    }

    fn entries(numbers: std::ops::Range<u64>) -> Vec<v1::DirectMapping> {
        let entry = |number| v1::DirectMapping {
            range: Some(v1::IovaRange {
                start: number * 4096,
                last: number * 4096 + 4095,
            }),
            memory_id: 1,
            offset: 0,
            perm: v1::Perm::Read.into(),
        };
        numbers.map(entry).collect()
    }

    fn piece(
        header: Option<v1::SetMapHeader>,
        entries: Vec<v1::DirectMapping>,
        commit: bool,
    ) -> v1::StreamSetMapRequest {
        v1::StreamSetMapRequest {
            header,
            entries,
            commit,
        }
    }

    async fn received(pieces: Vec<v1::StreamSetMapRequest>, limit: u32) -> Result<Table, Refusal> {
        let pieces = tokio_stream::iter(pieces.into_iter().map(Ok));
        let received = receive(pieces, |_| Ok(limit), queued()).await;
        received
            .map(|(table, _)| table)
            .map_err(|status| Refusal::from_status(&status))
    }

    #[tokio::test]
    async fn a_table_may_come_in_any_chunks() {
        let in_one = vec![piece(header("a"), entries(0..5), true)];
        let in_many = vec![
            piece(header("a"), vec![], false),
            piece(None, entries(0..3), false),
            piece(None, vec![], false),
            piece(None, entries(3..5), false),
            piece(None, vec![], true),
        ];
        let one = received(in_one, 5).await.unwrap();
        let many = received(in_many, 5).await.unwrap();
        assert_eq!((one.mappings.len(), many.mappings.len()), (5, 5));
        assert_eq!(one.mappings, many.mappings);
        assert_eq!(one.fingerprint, many.fingerprint);
        let other = vec![piece(header("a"), entries(0..4), true)];
        let other = received(other, 5).await.unwrap();
        assert_ne!(one.fingerprint, other.fingerprint);
    }

    #[tokio::test]
    async fn header_first_commit_last_or_nothing() {
        let wrong = [
            ("no header", vec![piece(None, entries(0..1), true)]),
            ("no message", vec![]),
            ("no commit", vec![piece(header(""), entries(0..1), false)]),
            (
                "two headers",
                vec![
                    piece(header(""), vec![], false),
                    piece(header(""), vec![], true),
                ],
            ),
            (
                "behind the commit",
                vec![piece(header(""), vec![], true), piece(None, vec![], false)],
            ),
            (
                "two commits",
                vec![piece(header(""), vec![], true), piece(None, vec![], true)],
            ),
        ];
        for (what, pieces) in wrong {
            let refusal = received(pieces, DIRECT_PER_DOMAIN).await.unwrap_err();
            assert_eq!(refusal.grpc_code(), Code::InvalidArgument, "{what}");
            assert_eq!(refusal.reason(), ErrorReason::Malformed, "{what}");
        }
    }

    #[tokio::test]
    async fn what_is_too_much_or_wrong_is_refused_before_the_rest_has_come() {
        // The rest never comes: a stream that is still open.
        let open = silent_after;
        let many = vec![
            piece(header(""), entries(0..3), false),
            piece(None, entries(3..5), false),
        ];
        let refused = receive(open(many), |_| Ok(4), queued()).await.unwrap_err();
        let refusal = Refusal::from_status(&refused);
        assert_eq!(refusal.reason(), ErrorReason::QuotaExceeded);
        assert_eq!(refusal.metadata["limit"], "4");

        let mut bad = entries(3..5);
        bad[1].perm = 9;
        let pieces = vec![
            piece(header(""), entries(0..3), false),
            piece(None, bad, false),
        ];
        let refused = receive(open(pieces), |_| Ok(9), queued())
            .await
            .unwrap_err();
        let refusal = Refusal::from_status(&refused);
        assert_eq!(refusal.reason(), ErrorReason::UnknownPerm);
        assert_eq!(refusal.metadata["entry_index"], "4");

        let long = piece(header(&"x".repeat(65)), vec![], false);
        let refused = receive(open(vec![long]), |_| Ok(9), queued())
            .await
            .unwrap_err();
        let refusal = Refusal::from_status(&refused);
        assert_eq!(refusal.reason(), ErrorReason::RequestId);
    }

    /// A stream that comes to this and then says nothing.
    fn silent_after(
        pieces: Vec<v1::StreamSetMapRequest>,
    ) -> impl Stream<Item = Result<v1::StreamSetMapRequest, Status>> + Unpin {
        tokio_stream::iter(pieces.into_iter().map(Ok)).chain(tokio_stream::pending())
    }

    #[tokio::test(start_paused = true)]
    async fn who_says_nothing_is_refused_and_gives_its_place_back() {
        let queue = Queue::of_table_streams();
        for pieces in [
            vec![],
            vec![piece(header(""), entries(0..1), false)],
            // Its end is missing.
            vec![piece(header(""), entries(0..1), true)],
        ] {
            let started = Instant::now();
            let received = receive(
                silent_after(pieces),
                |_| Ok(9),
                queue.enter(Tenant::user(1)).unwrap(),
            );
            let refused = received.await.unwrap_err();
            assert_eq!(refused.code(), Code::DeadlineExceeded);
            let took = started.elapsed();
            let late = SILENCE_LIMIT + Duration::from_millis(5);
            assert!((SILENCE_LIMIT..late).contains(&took), "{took:?}");
        }
        let again: Vec<_> = (0..TABLE_STREAMS_PER_USER)
            .map(|_| queue.enter(Tenant::user(1)))
            .collect();
        assert!(again.iter().all(Result::is_ok));
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_slow_is_not_silent() {
        let slow = vec![
            piece(header(""), entries(0..1), false),
            piece(None, entries(1..2), false),
            piece(None, vec![], true),
        ];
        let slow = tokio_stream::iter(slow).then(|piece| async {
            tokio::time::sleep(SILENCE_LIMIT - Duration::from_millis(5)).await;
            Ok(piece)
        });
        let received = receive(Box::pin(slow), |_| Ok(9), queued()).await;
        assert_eq!(received.unwrap().0.mappings.len(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn silent_streams_leave_the_places_to_those_that_have_begun() {
        let queue = Queue::of_table_streams();
        // More users than there are places for, none of which says a word.
        let mut silent: Vec<_> = (10..)
            .take(2 * TABLE_STREAMS)
            .map(|uid| {
                let queued = queue.enter(Tenant::user(uid)).unwrap();
                Box::pin(receive(silent_after(vec![]), |_| Ok(9), queued))
            })
            .collect();
        for stream in &mut silent {
            let waiting = timeout(Duration::ZERO, stream).await;
            assert!(waiting.is_err());
        }
        let table = vec![piece(header(""), entries(0..1), true)];
        let table = tokio_stream::iter(table.into_iter().map(Ok));
        let started = Instant::now();
        let received = receive(table, |_| Ok(9), queue.enter(Tenant::user(1)).unwrap()).await;
        assert!(received.is_ok());
        assert_eq!(started.elapsed(), Duration::ZERO);
    }
}
