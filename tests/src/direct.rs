//! The direct table, as somebody who may change it sees it: a session, the
//! domain's owner without one, or the operator.

use domaind_proto::v1;
use domaind_proto::v1::mapping_service_client::MappingServiceClient;
use prost::Message;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tonic::Request;
use tonic::codegen::tokio_stream::Stream;
use tonic::transport::Channel;

use crate::P;
use crate::node::{Node, name};
use crate::raw::{Memory, Raw, with_token};
use crate::refusal::{Refused, answer};

/// The whole 64-bit space.
pub const EVERYTHING: (u64, u64) = (0, u64::MAX);

/// Who calls, and in which domain.
#[derive(Clone, Debug)]
pub struct Caller {
    calls: MappingServiceClient<Channel>,
    token: Option<String>,
    domain: String,
}

impl Caller {
    /// A session, whose domain need not be named.
    #[must_use]
    pub fn session(raw: &Raw) -> Caller {
        Caller {
            calls: raw.calls.clone(),
            token: Some(raw.token()),
            domain: String::new(),
        }
    }

    /// The domain's owner, on the public socket and without a token.
    pub async fn owner(node: &Node, domain: &str) -> Caller {
        Caller {
            calls: MappingServiceClient::new(node.client().await.channel()),
            token: None,
            domain: name(domain),
        }
    }

    /// The operator.
    #[must_use]
    pub fn operator(node: &Node, domain: &str) -> Caller {
        Caller {
            calls: MappingServiceClient::new(node.admin().channel()),
            token: None,
            domain: name(domain),
        }
    }

    /// The same, naming this domain, or none.
    #[must_use]
    pub fn naming(&self, domain: &str) -> Caller {
        Caller {
            domain: domain.to_owned(),
            ..self.clone()
        }
    }

    /// The client of the service.
    #[must_use]
    pub fn calls(&self) -> MappingServiceClient<Channel> {
        self.calls.clone()
    }

    /// `domains/{domain}`, or nothing.
    #[must_use]
    pub fn domain(&self) -> String {
        self.domain.clone()
    }

    /// A request in the caller's name.
    pub fn signed<T>(&self, message: T) -> Request<T> {
        match &self.token {
            Some(token) => with_token(message, token),
            None => Request::new(message),
        }
    }

    /// MapDirect of one piece.
    ///
    /// # Panics
    /// If the answer has no mapping.
    pub async fn map(&self, entry: v1::MapDirectEntry) -> Refused<v1::DirectMapping> {
        let results = self.map_all(vec![entry], false).await?.results;
        match results.into_iter().next().and_then(|result| result.outcome) {
            Some(v1::map_direct_result::Outcome::Mapping(mapping)) => Ok(mapping),
            other => panic!("{other:?} without `partial`"),
        }
    }

    /// MapDirect.
    pub async fn map_all(
        &self,
        entries: Vec<v1::MapDirectEntry>,
        partial: bool,
    ) -> Refused<v1::MapDirectResponse> {
        let request = v1::MapDirectRequest {
            domain: self.domain(),
            entries,
            partial,
            ..Default::default()
        };
        answer(self.calls().map_direct(self.signed(request)).await)
    }

    /// UnmapDirect of one range; how many mappings and bytes.
    pub async fn unmap(&self, start: u64, last: u64) -> Refused<(u64, u64)> {
        self.unmap_all(&[(start, last)]).await
    }

    /// UnmapDirect.
    pub async fn unmap_all(&self, ranges: &[(u64, u64)]) -> Refused<(u64, u64)> {
        let request = v1::UnmapDirectRequest {
            domain: self.domain(),
            ranges: wire_ranges(ranges),
            ..Default::default()
        };
        let response = answer(self.calls().unmap_direct(self.signed(request)).await)?;
        Ok((response.unmapped_mappings, response.unmapped_bytes))
    }

    /// SetMap, whatever was there.
    pub async fn set_map(&self, entries: Vec<v1::DirectMapping>) -> Refused<v1::SetMapResponse> {
        self.set_map_if(entries, None).await
    }

    /// SetMap.
    pub async fn set_map_if(
        &self,
        entries: Vec<v1::DirectMapping>,
        expected_generation: Option<u64>,
    ) -> Refused<v1::SetMapResponse> {
        let request = v1::SetMapRequest {
            domain: self.domain(),
            entries,
            expected_generation,
            ..Default::default()
        };
        answer(self.calls().set_map(self.signed(request)).await)
    }

    /// StreamSetMap, message by message.
    ///
    /// # Panics
    /// If the answer says nothing.
    pub async fn stream(
        &self,
        messages: impl IntoIterator<Item = v1::StreamSetMapRequest>,
    ) -> Refused<v1::SetMapResponse> {
        let (sender, receiver) = stream();
        for message in messages {
            sender.send(message).expect("not received yet");
        }
        drop(sender);
        self.stream_from(receiver).await
    }

    /// StreamSetMap of what comes.
    ///
    /// # Panics
    /// If the answer says nothing.
    pub async fn stream_from(
        &self,
        messages: Messages<v1::StreamSetMapRequest>,
    ) -> Refused<v1::SetMapResponse> {
        let request = self.signed(messages);
        let response = answer(self.calls().stream_set_map(request).await)?;
        Ok(response.outcome.expect("an outcome"))
    }

    /// A table as StreamSetMap wants it: a header, chunks, and the commit.
    #[must_use]
    pub fn chunked(
        &self,
        table: &[v1::DirectMapping],
        chunk: usize,
    ) -> Vec<v1::StreamSetMapRequest> {
        let header = v1::StreamSetMapRequest {
            header: Some(self.header()),
            ..Default::default()
        };
        let chunks = table.chunks(chunk).map(|entries| v1::StreamSetMapRequest {
            entries: entries.to_vec(),
            ..Default::default()
        });
        let commit = v1::StreamSetMapRequest {
            commit: true,
            ..Default::default()
        };
        [header].into_iter().chain(chunks).chain([commit]).collect()
    }

    /// The header of a StreamSetMap.
    #[must_use]
    pub fn header(&self) -> v1::SetMapHeader {
        v1::SetMapHeader {
            domain: self.domain(),
            ..Default::default()
        }
    }

    /// ClearMap; how many mappings and bytes.
    pub async fn clear(&self, ranges: &[(u64, u64)]) -> Refused<(u64, u64)> {
        let request = v1::ClearMapRequest {
            domain: self.domain(),
            ranges: wire_ranges(ranges),
            ..Default::default()
        };
        let response = answer(self.calls().clear_map(self.signed(request)).await)?;
        Ok((response.removed_mappings, response.removed_bytes))
    }

    /// ResetBounce; how many mappings were ended.
    pub async fn reset(&self, force: bool) -> Refused<u64> {
        let request = v1::ResetBounceRequest {
            domain: self.domain(),
            force,
            ..Default::default()
        };
        let response = answer(self.calls().reset_bounce(self.signed(request)).await)?;
        Ok(response.ended_mappings)
    }

    /// Translate.
    pub async fn translate(
        &self,
        start: u64,
        last: u64,
        want: v1::Perm,
    ) -> Refused<Vec<v1::Piece>> {
        let request = v1::TranslateRequest {
            domain: self.domain(),
            range: Some(range(start, last)),
            want: want.into(),
        };
        let response = answer(self.calls().translate(self.signed(request)).await)?;
        Ok(response.pieces)
    }

    /// Lookup.
    pub async fn lookup(&self, start: u64, last: u64) -> Refused<v1::Mapping> {
        let request = v1::LookupRequest {
            domain: self.domain(),
            range: Some(range(start, last)),
        };
        answer(self.calls().lookup(self.signed(request)).await)
    }

    /// One page of ListMappings.
    pub async fn list(
        &self,
        request: v1::ListMappingsRequest,
    ) -> Refused<v1::ListMappingsResponse> {
        let request = v1::ListMappingsRequest {
            domain: self.domain(),
            ..request
        };
        answer(self.calls().list_mappings(self.signed(request)).await)
    }

    /// All pages of ListMappings.
    ///
    /// # Panics
    /// If it is refused, or gives the same page for ever.
    pub async fn list_all(&self, mut request: v1::ListMappingsRequest) -> Vec<v1::Mapping> {
        let mut mappings: Vec<v1::Mapping> = Vec::new();
        loop {
            let page = self.list(request.clone()).await.expect("ListMappings");
            mappings.extend(page.mappings);
            if page.next_page_token.is_empty() {
                return mappings;
            }
            assert_ne!(page.next_page_token, request.page_token);
            request.page_token = page.next_page_token;
        }
    }
}

/// The direct table and when it became what it is, to compare.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Table {
    /// ListMappings, as bytes.
    dump: Vec<Vec<u8>>,
    /// Of the domain.
    pub generation: u64,
    /// Of the table.
    pub direct_generation: u64,
    /// The direct mappings.
    pub mappings: Vec<(u64, u64, u64, u64)>,
}

impl Table {
    /// Everything that is mapped in a domain, now.
    ///
    /// # Panics
    /// If there is no such domain.
    pub async fn of(node: &Node, domain: &str) -> Table {
        let before = node.get(domain).await.expect("it is there");
        let all = node.mappings(domain).await;
        let direct = all.iter().filter(|mapping| is_direct(mapping));
        Table {
            dump: all.iter().map(Message::encode_to_vec).collect(),
            generation: before.generation,
            direct_generation: before.direct_generation,
            mappings: direct.map(in_numbers).collect(),
        }
    }
}

fn is_direct(mapping: &v1::Mapping) -> bool {
    mapping.kind() == v1::MappingKind::Direct
}

fn in_numbers(mapping: &v1::Mapping) -> (u64, u64, u64, u64) {
    let last = mapping.iova + (mapping.len_bytes - 1);
    (mapping.iova, last, mapping.memory_id, mapping.offset)
}

/// The space without apertures, up to its end.
#[must_use]
pub fn bare() -> v1::DomainSpec {
    v1::DomainSpec {
        iova_limit: Some(u64::MAX),
        ..crate::node::spec(0, 0)
    }
}

/// A range on the wire.
#[must_use]
pub fn range(start: u64, last: u64) -> v1::IovaRange {
    v1::IovaRange { start, last }
}

/// Ranges on the wire.
#[must_use]
pub fn wire_ranges(ranges: &[(u64, u64)]) -> Vec<v1::IovaRange> {
    ranges
        .iter()
        .map(|(start, last)| range(*start, *last))
        .collect()
}

/// First and last of a range that must be there.
///
/// # Panics
/// If it is not.
#[must_use]
#[track_caller]
pub fn ends(range: Option<v1::IovaRange>) -> (u64, u64) {
    let range = range.expect("a range");
    (range.start, range.last)
}

impl Memory {
    /// A piece of so many pages, from a page on, for MapDirect at this page of
    /// the space.
    #[must_use]
    pub fn at(&self, iova_page: u64, pages: u64) -> v1::MapDirectEntry {
        v1::MapDirectEntry {
            iova: Some(iova_page * P),
            ..self.anywhere(pages)
        }
    }

    /// The same wherever there is room.
    #[must_use]
    pub fn anywhere(&self, pages: u64) -> v1::MapDirectEntry {
        v1::MapDirectEntry {
            memory_id: self.id,
            len_bytes: pages * P,
            perm: v1::Perm::ReadWrite.into(),
            ..Default::default()
        }
    }

    /// An entry for SetMap: so many pages of memory, from its beginning, at
    /// this page of the space.
    #[must_use]
    pub fn row(&self, iova_page: u64, pages: u64) -> v1::DirectMapping {
        self.row_from(iova_page, pages, 0)
    }

    /// The same from a page of the memory on.
    #[must_use]
    pub fn row_from(&self, iova_page: u64, pages: u64, page: u64) -> v1::DirectMapping {
        v1::DirectMapping {
            range: Some(range(iova_page * P, (iova_page + pages) * P - 1)),
            memory_id: self.id,
            offset: page * P,
            perm: v1::Perm::ReadWrite.into(),
        }
    }
}

/// A stream of messages that a test feeds while it goes.
#[derive(Debug)]
pub struct Messages<T>(UnboundedReceiver<T>);

/// Such a stream, and the end that feeds it; dropped, it is complete.
#[must_use]
pub fn stream<T>() -> (UnboundedSender<T>, Messages<T>) {
    let (sender, receiver) = unbounded_channel();
    (sender, Messages(receiver))
}

impl<T> Stream for Messages<T> {
    type Item = T;

    fn poll_next(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<T>> {
        self.0.poll_recv(context)
    }
}
