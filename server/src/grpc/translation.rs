//! What is where: Translate, Lookup, ListMappings. Changes nothing.

use domain_core::addr::Iova;
use domaind_proto::convert;
use domaind_proto::names::parse_session;
use domaind_proto::v1::{self, ErrorReason, Refusal};
use tonic::Code;

use super::caller::Agent;
use super::page;
use crate::offload::yielding;
use crate::visitor::Need;

const PAGE: usize = 1000;
const PAGE_MOST: usize = 10_000;

pub(super) fn translate(
    agent: &Agent,
    request: &v1::TranslateRequest,
) -> Result<v1::TranslateResponse, Refusal> {
    let (domain, _) = agent.domain(&request.domain, Need::See)?;
    let range = convert::given_range("range", request.range)?;
    let want = convert::perm(request.want)?;
    let (pieces, generation) = domain.core.translate(range, want)?;
    Ok(v1::TranslateResponse {
        pieces: pieces.iter().map(v1::Piece::from).collect(),
        generation,
    })
}

pub(super) fn lookup(agent: &Agent, request: &v1::LookupRequest) -> Result<v1::Mapping, Refusal> {
    let (domain, _) = agent.domain(&request.domain, Need::See)?;
    let range = convert::given_range("range", request.range)?;
    let found = domain.core.lookup(range).ok_or_else(|| {
        let message = format!("nothing is mapped in {range}");
        Refusal::because(Code::NotFound, ErrorReason::NotMapped, message).with_range("range", range)
    })?;
    Ok(found.into())
}

pub(super) fn list(
    agent: &Agent,
    request: &v1::ListMappingsRequest,
) -> Result<v1::ListMappingsResponse, Refusal> {
    let (domain, _) = agent.domain(&request.domain, Need::See)?;
    let owner = match request.session.as_str() {
        "" => None,
        name => Some(parse_session(name)?),
    };
    let filter = convert::mapping_filter(request, owner)?;
    let size = page::size(request.page_size, PAGE, PAGE_MOST);
    let from = page::start(&request.page_token, next_iova)?.unwrap_or(Iova::new(0));
    // A filter that little passes has the whole domain looked through.
    let mut mappings = yielding(true, || domain.core.mappings(filter, from, size + 1));
    let next_page_token = page::cut(&mut mappings, size, |last| last.visible.last().to_string());
    Ok(v1::ListMappingsResponse {
        mappings: mappings.into_iter().map(v1::Mapping::from).collect(),
        next_page_token,
    })
}

/// A token is the last address of the page before.
fn next_iova(token: &str) -> Option<Iova> {
    let last = u64::from_str_radix(token.strip_prefix("0x")?, 16).ok()?;
    Iova::new(last).checked_add(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_begins_behind_the_last_address_of_the_one_before() {
        assert_eq!(next_iova("0x1fff"), Some(Iova::new(0x2000)));
        assert_eq!(next_iova(&Iova::new(u64::MAX).to_string()), None);
        assert_eq!(next_iova("1fff"), None);
    }
}
