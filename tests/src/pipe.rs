//! A pipeline without the client library's manners.

use domaind_proto::v1::{self, PipelineOperation, PipelineRequest, PipelineResponse};
use tokio::sync::mpsc::UnboundedSender;
use tonic::Streaming;

use crate::direct::stream;
use crate::raw::Raw;
use crate::refusal::{Refused, answer, of_status};
use crate::wait::soon;

/// One pipeline of a session.
#[derive(Debug)]
pub struct Pipe {
    requests: UnboundedSender<PipelineRequest>,
    answers: Streaming<PipelineResponse>,
}

impl Pipe {
    /// Opens one.
    pub async fn open(session: &Raw) -> Refused<Pipe> {
        let (requests, sent) = stream();
        let opening = session.calls.clone();
        let opened = { opening }.pipeline(session.signed(sent)).await;
        let answers = answer(opened)?;
        Ok(Pipe { requests, answers })
    }

    /// Sends a batch and waits for nothing. One that cannot be sent any more is
    /// lost, and what is read says why.
    pub fn send(&self, request: PipelineRequest) {
        let _ = self.requests.send(request);
    }

    /// The next answer; `None` if the stream has ended in order.
    pub async fn next(&mut self) -> Option<Refused<PipelineResponse>> {
        let answer = soon("an answer", self.answers.message()).await;
        answer.map_err(|status| of_status(&status)).transpose()
    }

    /// Sends a batch and reads its answer, to the operation that was asked for.
    ///
    /// # Panics
    /// If the stream ends.
    pub async fn ask(&mut self, request: PipelineRequest) -> Refused<PipelineResponse> {
        let operation = request.operation;
        self.send(request);
        let answer = self.next().await.expect("an answer, not the end");
        let answer = answer.unwrap_or_else(|refusal| panic!("the end: {refusal:?}"));
        assert_eq!(answer.operation, operation, "{answer:?}");
        match answer.refusal {
            Some(refusal) => Err(refusal),
            None => Ok(answer),
        }
    }

    /// Sends no more, and reads the end, behind whatever is still answered.
    pub async fn finish(self) -> Refused<()> {
        let Pipe {
            requests,
            mut answers,
        } = self;
        drop(requests);
        loop {
            match soon("the end", answers.message()).await {
                Ok(Some(_)) => {}
                Ok(None) => return Ok(()),
                Err(status) => return Err(of_status(&status)),
            }
        }
    }
}

/// A Map of these entries, with a value for each in every column.
#[must_use]
pub fn maps(entries: &[v1::MapEntry]) -> PipelineRequest {
    let each = entries.iter();
    PipelineRequest {
        operation: PipelineOperation::Map.into(),
        memory_id: each.clone().map(|entry| entry.memory_id).collect(),
        offset: each.clone().map(|entry| entry.offset).collect(),
        len_bytes: each.clone().map(|entry| entry.len_bytes).collect(),
        direction: each.clone().map(|entry| entry.direction).collect(),
        keep_offset: each.clone().map(|entry| entry.keep_offset).collect(),
        preserve: each.clone().map(|entry| entry.preserve).collect(),
        skip_sync: each.clone().map(|entry| entry.skip_sync).collect(),
        align_bytes: each.clone().map(|entry| entry.align_bytes).collect(),
        limit: each.map(|entry| entry.limit.unwrap_or(u64::MAX)).collect(),
        ..Default::default()
    }
}

/// An Unmap of these entries.
#[must_use]
pub fn unmaps(entries: &[v1::UnmapEntry]) -> PipelineRequest {
    let each = entries.iter();
    let written = |entry: &v1::UnmapEntry| entry.written_bytes.unwrap_or(u64::MAX);
    PipelineRequest {
        operation: PipelineOperation::Unmap.into(),
        iova: each.clone().map(|entry| entry.iova).collect(),
        mapping_id: each.clone().map(|entry| entry.mapping_id).collect(),
        skip_sync: each.clone().map(|entry| entry.skip_sync).collect(),
        written_bytes: each.map(written).collect(),
        ..Default::default()
    }
}

/// A Sync of these entries.
#[must_use]
pub fn syncs(entries: &[v1::SyncEntry]) -> PipelineRequest {
    let each = entries.iter();
    PipelineRequest {
        operation: PipelineOperation::Sync.into(),
        iova: each.clone().map(|entry| entry.iova).collect(),
        mapping_id: each.clone().map(|entry| entry.mapping_id).collect(),
        offset: each.clone().map(|entry| entry.offset).collect(),
        len_bytes: each.clone().map(|entry| entry.len_bytes).collect(),
        target: each.map(|entry| entry.target).collect(),
        ..Default::default()
    }
}

/// What an answer says is mapped, entry by entry.
#[must_use]
pub fn places(answer: &PipelineResponse, lengths: &[u64]) -> Vec<v1::StreamingMapping> {
    let places = answer.mapping_id.iter().zip(&answer.iova).zip(lengths);
    let place = |((id, iova), len): ((&u64, &u64), &u64)| v1::StreamingMapping {
        mapping_id: *id,
        iova: *iova,
        len_bytes: *len,
    };
    places.map(place).collect()
}
