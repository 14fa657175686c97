//! StreamSetMap: a direct table that comes in pieces.
//!
//! What has come is kept parsed, at most as many entries as the domain may have,
//! for at most as long as any call may take, for at most so many callers. The
//! domain is not touched before the stream has come to its end.

use std::sync::Arc;

use domain_core::direct::{DirectMapping, SetMapError};
use domain_core::limits::{TABLE_STREAMS, TABLE_STREAMS_PER_USER};
use domaind_proto::convert;
use domaind_proto::v1::{self, ErrorReason, Refusal};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_stream::{Stream, StreamExt};
use tonic::{Code, Status};

use crate::accept::{Seat, Seats};
use crate::replay::{Fingerprint, Fingerprinting};

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

/// Reads a whole table. `limit_of` says how many entries its domain may have.
/// Cancelling drops what has come.
///
/// # Errors
/// A refusal as soon as something is wrong.
pub(super) async fn receive(
    mut pieces: impl Stream<Item = Result<v1::StreamSetMapRequest, Status>> + Unpin,
    limit_of: impl FnOnce(&v1::SetMapHeader) -> Result<u32, Refusal>,
) -> Result<Table, Status> {
    let first = pieces.next().await.transpose()?.unwrap_or_default();
    let header = first
        .header
        .ok_or_else(|| malformed("the first message has no header"))?;
    convert::request_id(&header.request_id).map_err(Refusal::from)?;
    let mut growing = Growing::new(limit_of(&header)?, header);
    growing.add(&first.entries, first.commit)?;
    while let Some(piece) = pieces.next().await.transpose()? {
        if piece.header.is_some() {
            return Err(malformed("a second header").into());
        }
        growing.add(&piece.entries, piece.commit)?;
    }
    Ok(growing.finish()?)
}

impl Growing {
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

/// How many tables may be on their way at a time. Clones share the count.
#[derive(Clone, Debug)]
pub(crate) struct TableSeats {
    of_users: Seats,
    all: Arc<Semaphore>,
}

/// A place for one table.
#[derive(Debug)]
pub(super) struct TableSeat {
    _user: Seat,
    _all: OwnedSemaphorePermit,
}

impl TableSeats {
    pub(crate) fn new() -> TableSeats {
        TableSeats {
            of_users: Seats::new(TABLE_STREAMS_PER_USER),
            all: Arc::new(Semaphore::new(TABLE_STREAMS)),
        }
    }

    /// Refuses a user that has too many, and waits its turn among the others.
    pub(super) async fn take(&self, uid: u32) -> Result<TableSeat, Refusal> {
        let user = self.of_users.take(uid).ok_or_else(|| {
            let most = TABLE_STREAMS_PER_USER;
            let message = format!("user {uid} is streaming {most} tables already");
            Refusal::because(Code::ResourceExhausted, ErrorReason::QuotaExceeded, message)
                .with("quota", "table_streams")
                .with("limit", most)
                .with("used", most)
        })?;
        let all = Arc::clone(&self.all).acquire_owned().await;
        Ok(TableSeat {
            _user: user,
            _all: all.expect("nobody closes it"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use domain_core::limits::DIRECT_PER_DOMAIN;

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
        let table = receive(pieces, |_| Ok(limit)).await;
        table.map_err(|status| Refusal::from_status(&status))
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
        let open = |pieces: Vec<v1::StreamSetMapRequest>| {
            tokio_stream::iter(pieces.into_iter().map(Ok)).chain(tokio_stream::pending())
        };
        let many = vec![
            piece(header(""), entries(0..3), false),
            piece(None, entries(3..5), false),
        ];
        let refused = receive(open(many), |_| Ok(4)).await.unwrap_err();
        let refusal = Refusal::from_status(&refused);
        assert_eq!(refusal.reason(), ErrorReason::QuotaExceeded);
        assert_eq!(refusal.metadata["limit"], "4");

        let mut bad = entries(3..5);
        bad[1].perm = 9;
        let pieces = vec![
            piece(header(""), entries(0..3), false),
            piece(None, bad, false),
        ];
        let refused = receive(open(pieces), |_| Ok(9)).await.unwrap_err();
        let refusal = Refusal::from_status(&refused);
        assert_eq!(refusal.reason(), ErrorReason::UnknownPerm);
        assert_eq!(refusal.metadata["entry_index"], "4");

        let long = piece(header(&"x".repeat(65)), vec![], false);
        let refused = receive(open(vec![long]), |_| Ok(9)).await.unwrap_err();
        let refusal = Refusal::from_status(&refused);
        assert_eq!(refusal.reason(), ErrorReason::RequestId);
    }

    #[tokio::test]
    async fn one_user_cannot_take_all_the_places() {
        let seats = TableSeats::new();
        let mut taken = Vec::new();
        for _ in 0..TABLE_STREAMS_PER_USER {
            taken.push(seats.take(1).await.unwrap());
        }
        let refusal = seats.take(1).await.unwrap_err();
        assert_eq!(refusal.reason(), ErrorReason::QuotaExceeded);
        assert!(TABLE_STREAMS > taken.len());
        assert!(seats.take(2).await.is_ok());
        taken.pop();
        assert!(seats.take(1).await.is_ok());
    }
}
