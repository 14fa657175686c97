//! Pages of lists: how long, and where the next one begins.

use domain_core::limits::RESPONSE_BYTES;
use domaind_proto::Message;
use domaind_proto::convert::Malformed;

/// Encoded items of one page, with room for the rest of the answer and for one
/// item too many.
const PAGE_BYTES: usize = RESPONSE_BYTES / 2;

/// How many items a page has: what was asked, a default, and a bound.
pub(crate) fn size(asked: u32, default: usize, most: usize) -> usize {
    match usize::try_from(asked) {
        Ok(0) | Err(_) => default,
        Ok(asked) => asked.min(most),
    }
}

/// Reads a token with `parse`; an empty one means the first page.
pub(crate) fn start<T>(
    token: &str,
    parse: impl FnOnce(&str) -> Option<T>,
) -> Result<Option<T>, Malformed> {
    if token.is_empty() {
        return Ok(None);
    }
    let malformed = || Malformed::PageToken {
        token: token.chars().take(64).collect(),
    };
    parse(token).map(Some).ok_or_else(malformed)
}

/// As many of the items as one answer can hold: few of those that are large.
pub(crate) fn fitting<M: Message>(items: impl Iterator<Item = M>) -> Vec<M> {
    let mut room = Some(PAGE_BYTES);
    let mut fits = |item: &M| {
        let had_room = room.is_some();
        room = room.and_then(|room| room.checked_sub(item.encoded_len()));
        had_room
    };
    items.take_while(|item| fits(item)).collect()
}

/// Cuts one item too many off a page, and makes the token of the next page
/// from the last item that stays.
pub(crate) fn cut<T>(items: &mut Vec<T>, size: usize, token: impl FnOnce(&T) -> String) -> String {
    let more = items.len() > size;
    items.truncate(size);
    items.last().filter(|_| more).map(token).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_that_is_not_the_last_names_the_next() {
        let mut items = vec![1, 2, 3];
        assert_eq!(cut(&mut items, 2, ToString::to_string), "2");
        assert_eq!(items, [1, 2]);
        assert_eq!(cut(&mut items, 2, ToString::to_string), "");
        assert_eq!(
            (
                size(0, 100, 1000),
                size(7, 100, 1000),
                size(5000, 100, 1000)
            ),
            (100, 7, 1000)
        );
    }

    #[test]
    fn a_page_of_large_items_is_shorter_and_never_empty() {
        let item = |bytes| domaind_proto::v1::Domain {
            name: "x".repeat(bytes),
            ..Default::default()
        };
        let page = |bytes, items: usize| fitting((0..items).map(|_| item(bytes))).len();
        assert_eq!(page(10, 1000), 1000);
        let large = page(64 << 10, 1000);
        assert!((2..100).contains(&large), "{large} items");
        assert!(large * (64 << 10) < RESPONSE_BYTES);
        assert_eq!(page(PAGE_BYTES, 3), 1);
    }

    #[test]
    fn a_foreign_token_is_refused() {
        assert_eq!(start("", |t| t.parse::<u64>().ok()), Ok(None));
        assert_eq!(start("9", |t| t.parse::<u64>().ok()), Ok(Some(9)));
        assert!(start("x", |t| t.parse::<u64>().ok()).is_err());
    }
}
