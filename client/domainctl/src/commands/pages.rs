//! All pages of a list as one.

use crate::exit::Exit;
use crate::failure::Failure;

/// Asks for pages until there are no more. `page` takes a token and answers
/// the page and the next token.
pub(super) async fn all<T>(
    mut page: impl AsyncFnMut(String) -> Result<(Vec<T>, String), Failure>,
) -> Result<Vec<T>, Failure> {
    let mut items = Vec::new();
    let mut token = String::new();
    loop {
        let (more, next) = page(token.clone()).await?;
        items.extend(more);
        if next.is_empty() {
            return Ok(items);
        }
        // Else a broken server could keep us here for ever.
        if next == token {
            let message = "the daemon answers the same page again and again";
            return Err(Failure::new(Exit::Error, message));
        }
        token = next;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn pages_are_joined_in_order() {
        let pages = async |token: String| {
            Ok(match token.as_str() {
                "" => (vec![1, 2], "a".to_owned()),
                "a" => (vec![], "b".to_owned()),
                _ => (vec![3], String::new()),
            })
        };
        assert_eq!(all(pages).await.unwrap(), [1, 2, 3]);
    }

    #[tokio::test]
    async fn a_page_that_leads_to_itself_is_an_error() {
        let pages = async |_| Ok((vec![1], "a".to_owned()));
        assert_eq!(all(pages).await.unwrap_err().exit(), Exit::Error);
    }
}
