//! Pages of lists: how long, and where the next one begins.

use domaind_proto::convert::Malformed;

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
    fn a_foreign_token_is_refused() {
        assert_eq!(start("", |t| t.parse::<u64>().ok()), Ok(None));
        assert_eq!(start("9", |t| t.parse::<u64>().ok()), Ok(Some(9)));
        assert!(start("x", |t| t.parse::<u64>().ok()).is_err());
    }
}
