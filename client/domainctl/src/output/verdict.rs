//! One sentence about what was done.

use serde::Serialize;

use super::{Style, View};

/// `domains/d0 created`. Serialises as the daemon's answer.
#[derive(Debug, Serialize)]
#[serde(transparent)]
pub(crate) struct Verdict<T> {
    answer: T,
    #[serde(skip)]
    name: String,
    #[serde(skip)]
    what: String,
}

impl<T> Verdict<T> {
    pub(crate) fn new(answer: T, name: String, what: impl Into<String>) -> Verdict<T> {
        let what = what.into();
        Verdict { answer, name, what }
    }
}

impl<T: Serialize> View for Verdict<T> {
    fn text(&self, _style: &Style) -> String {
        format!("{} {}\n", self.name, self.what)
    }

    fn names(&self) -> Vec<String> {
        vec![self.name.clone()]
    }
}
