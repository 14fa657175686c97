//! How answers are printed: one view of the data, five formats.

mod describe;
mod direct;
mod domain;
mod info;
mod json;
mod list;
mod mapping;
mod memory;
mod name;
mod printer;
mod reload;
mod session;
mod table;
mod verdict;
mod watch;
mod yaml;

use serde::Serialize;

use crate::cli::{Format, Global};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::range;
use crate::time;
use domaind_proto::size::human;

pub(crate) use describe::Sheet;
pub(crate) use domain::DomainSheet;
pub(crate) use list::{List, One, Row};
pub(crate) use mapping::Lease;
pub(crate) use printer::Printer;
pub(crate) use session::SessionSheet;
pub(crate) use verdict::Verdict;
pub(crate) use watch::{Watched, watch_headers};

/// What a command answers. Its JSON and YAML are what it serialises to.
pub(crate) trait View: Serialize {
    /// For people, with a newline at the end.
    fn text(&self, style: &Style) -> String;

    /// For scripts that go on with the names.
    fn names(&self) -> Vec<String>;

    /// What to tell people instead if there is nothing to show.
    fn nothing(&self) -> Option<String> {
        None
    }

    /// In the format that was asked for, with a newline at the end.
    fn render(&self, style: &Style) -> Result<String, Failure>
    where
        Self: Sized,
    {
        match style.format {
            Format::Table | Format::Wide => Ok(self.text(style)),
            Format::Json => json::render(self).map_err(|error| Failure::of(Exit::Error, &error)),
            Format::Yaml => yaml::render(self).map_err(|error| Failure::of(Exit::Error, &error)),
            Format::Name => Ok(name::render(&self.names())),
        }
    }
}

/// How people want it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Style {
    pub(crate) format: Format,
    /// Tables have a line of headers.
    pub(crate) headers: bool,
    /// Ages count from here.
    pub(crate) now_ms: u64,
}

impl Style {
    pub(crate) fn of(global: &Global) -> Style {
        Style {
            format: global.output,
            headers: !global.no_headers,
            now_ms: time::now_ms(),
        }
    }

    pub(crate) fn wide(&self) -> bool {
        self.format == Format::Wide
    }
}

/// A value of an enum as people write it: `BACKING_HUGETLB_2M` is `hugetlb-2m`.
/// What is unspecified is `-`.
fn word(proto_name: &str, prefix: &str) -> String {
    match proto_name.strip_prefix(prefix).unwrap_or(proto_name) {
        "UNSPECIFIED" => "-".to_owned(),
        name => name.to_ascii_lowercase().replace('_', "-"),
    }
}

/// `d0` of `domains/d0`; `-` of nothing.
fn bare(name: &str) -> &str {
    match name.rsplit('/').next() {
        None | Some("") => "-",
        Some(bare) => bare,
    }
}

/// `0x1000-0x1fff`, both included; `-` of nothing.
fn wire_range(range: Option<&domaind_proto::v1::IovaRange>) -> String {
    match range {
        None => "-".to_owned(),
        Some(range) => range::hex(range.start, range.last),
    }
}

/// `2 (128 KiB)`, or `0`.
fn leases(count: u64, bytes: u64) -> String {
    match count {
        0 => "0".to_owned(),
        count => format!("{count} ({})", human(bytes)),
    }
}

fn yes_no(yes: bool) -> &'static str {
    if yes { "yes" } else { "no" }
}

#[cfg(test)]
mod tests {
    use super::*;
    use domaind_proto::v1;

    #[test]
    fn enum_values_read_as_on_the_command_line() {
        let backing = |value: v1::Backing| word(value.as_str_name(), "BACKING_");
        assert_eq!(backing(v1::Backing::Hugetlb2m), "hugetlb-2m");
        let scrub = |value: v1::Scrub| word(value.as_str_name(), "SCRUB_");
        assert_eq!(scrub(v1::Scrub::OnUnmap), "on-unmap");
        assert_eq!(scrub(v1::Scrub::Unspecified), "-");
    }

    #[test]
    fn tables_show_bare_names() {
        assert_eq!(bare("domains/d0"), "d0");
        assert_eq!(bare(""), "-");
    }
}
