//! Lists of one kind of thing, and one thing of a kind.

use serde::ser::{Serialize, SerializeMap, Serializer};

use super::{Style, View, table};

/// A thing that is a line of a table.
pub(crate) trait Row: Serialize {
    /// What many of them are called: in `No domains found.`, and as the field
    /// of the List answer.
    const PLURAL: &'static str;

    /// The headers.
    fn headers(style: &Style) -> Vec<&'static str>;

    /// What stands under them.
    fn cells(&self, style: &Style) -> Vec<String>;

    /// Its resource name, below that of the list's parent if it has one.
    fn name(&self) -> String;
}

/// All pages of a List call in one. Serialises as that call's answer would,
/// without the token of a next page.
#[derive(Debug)]
pub(crate) struct List<T> {
    items: Vec<T>,
    /// `domains/d0/` for things that have their names in a domain.
    parent: String,
}

/// One thing, asked for by its name. Serialises as itself.
#[derive(Debug, serde::Serialize)]
#[serde(transparent)]
pub(crate) struct One<T> {
    item: T,
    #[serde(skip)]
    parent: String,
}

impl<T> List<T> {
    /// Things whose names stand for themselves.
    pub(crate) fn of(items: Vec<T>) -> List<T> {
        List::within("", items)
    }

    /// Things that have their names in a parent.
    pub(crate) fn within(parent: &str, items: Vec<T>) -> List<T> {
        let parent = prefix(parent);
        List { items, parent }
    }
}

impl<T> One<T> {
    /// A thing whose name stands for itself.
    pub(crate) fn of(item: T) -> One<T> {
        One::within("", item)
    }

    /// A thing that has its name in a parent.
    pub(crate) fn within(parent: &str, item: T) -> One<T> {
        let parent = prefix(parent);
        One { item, parent }
    }
}

fn prefix(parent: &str) -> String {
    match parent {
        "" => String::new(),
        parent => format!("{parent}/"),
    }
}

impl<T: Row> Serialize for List<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(1))?;
        map.serialize_entry(T::PLURAL, &self.items)?;
        map.end()
    }
}

impl<T: Row> View for List<T> {
    fn text(&self, style: &Style) -> String {
        rows(&self.items, style)
    }

    fn names(&self) -> Vec<String> {
        let name = |item: &T| format!("{}{}", self.parent, item.name());
        self.items.iter().map(name).collect()
    }

    fn nothing(&self) -> Option<String> {
        self.items
            .is_empty()
            .then(|| format!("No {} found.", T::PLURAL))
    }
}

impl<T: Row> View for One<T> {
    fn text(&self, style: &Style) -> String {
        rows(std::slice::from_ref(&self.item), style)
    }

    fn names(&self) -> Vec<String> {
        vec![format!("{}{}", self.parent, self.item.name())]
    }
}

/// A table of things of one kind.
pub(super) fn rows<T: Row>(items: &[T], style: &Style) -> String {
    let headers = T::headers(style);
    let cells: Vec<_> = items.iter().map(|item| item.cells(style)).collect();
    table::render(style.headers.then_some(headers.as_slice()), &cells)
}
