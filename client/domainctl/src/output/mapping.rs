//! Mappings and allocations as people see them.

use domain_core::addr::Iova;
use domaind_proto::v1;

use super::list::Row;
use super::{Style, bare, word, yes_no};
use crate::range::hex;
use domaind_proto::size::human;

impl Row for v1::Mapping {
    const PLURAL: &'static str = "mappings";

    fn headers(style: &Style) -> Vec<&'static str> {
        let mut headers = vec![
            "IOVA", "LEN", "ID", "KIND", "PERM", "MEMORY", "OFFSET", "SESSION", "STATE",
        ];
        if style.wide() {
            headers.extend(["RANGE", "DIRECTION", "PERSISTENT", "BLOCKED-BY"]);
        }
        headers
    }

    fn cells(&self, style: &Style) -> Vec<String> {
        let mut cells = vec![
            Iova::new(self.iova).to_string(),
            human(self.len_bytes),
            id(self),
            word(self.kind().as_str_name(), "MAPPING_KIND_"),
            word(self.perm().as_str_name(), "PERM_"),
            in_memory(self, self.memory_id.to_string()),
            in_memory(self, format!("{:#x}", self.offset)),
            bare(&self.session).to_owned(),
            word(self.state().as_str_name(), "MAPPING_STATE_"),
        ];
        if style.wide() {
            cells.extend(more(self));
        }
        cells
    }

    /// A direct mapping has no number; `unmap` takes its range.
    fn name(&self) -> String {
        match self.kind() {
            v1::MappingKind::Direct => format!("mappings/{}", range(self)),
            _ => format!("mappings/{}", self.mapping_id),
        }
    }
}

/// What stands under the wide headers.
fn more(mapping: &v1::Mapping) -> [String; 4] {
    [
        range(mapping),
        word(mapping.direction().as_str_name(), "DIRECTION_"),
        yes_no(mapping.persistent).to_owned(),
        bare(&mapping.blocked_by).to_owned(),
    ]
}

fn range(mapping: &v1::Mapping) -> String {
    let last = mapping.iova.saturating_add(mapping.len_bytes.max(1) - 1);
    hex(mapping.iova, last)
}

fn id(mapping: &v1::Mapping) -> String {
    match mapping.kind() {
        v1::MappingKind::Direct => "-".to_owned(),
        _ => mapping.mapping_id.to_string(),
    }
}

/// What says something only where registered memory stands behind a mapping.
fn in_memory(mapping: &v1::Mapping, number: String) -> String {
    match mapping.kind() {
        v1::MappingKind::Streaming | v1::MappingKind::Direct => number,
        v1::MappingKind::Coherent | v1::MappingKind::Lease | v1::MappingKind::Unspecified => {
            "-".to_owned()
        }
    }
}

/// A lease, in a list of nothing else. Serialises as the mapping that it is.
#[derive(Debug, serde::Serialize)]
#[serde(transparent)]
pub(crate) struct Lease(pub(crate) v1::Mapping);

impl Row for Lease {
    const PLURAL: &'static str = "leases";

    fn headers(style: &Style) -> Vec<&'static str> {
        let mut headers = vec!["IOVA", "LEN", "ID", "SESSION", "STATE"];
        if style.wide() {
            headers.extend(["RANGE", "BLOCKED-BY"]);
        }
        headers
    }

    fn cells(&self, style: &Style) -> Vec<String> {
        let Lease(mapping) = self;
        let mut cells = vec![
            Iova::new(mapping.iova).to_string(),
            human(mapping.len_bytes),
            id(mapping),
            bare(&mapping.session).to_owned(),
            word(mapping.state().as_str_name(), "MAPPING_STATE_"),
        ];
        if style.wide() {
            cells.extend([range(mapping), bare(&mapping.blocked_by).to_owned()]);
        }
        cells
    }

    /// Among the mappings, of which it is one.
    fn name(&self) -> String {
        self.0.name()
    }
}

/// An allocation just made. Its id names it in `free`.
impl Row for v1::AllocCoherentResponse {
    const PLURAL: &'static str = "mappings";

    fn headers(_style: &Style) -> Vec<&'static str> {
        vec!["IOVA", "LEN", "ID"]
    }

    fn cells(&self, _style: &Style) -> Vec<String> {
        vec![
            Iova::new(self.iova).to_string(),
            human(self.len_bytes),
            self.mapping_id.to_string(),
        ]
    }

    fn name(&self) -> String {
        format!("mappings/{}", self.mapping_id)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{List, One, View};
    use super::*;
    use crate::cli::Format;

    fn mapping() -> v1::Mapping {
        v1::Mapping {
            kind: v1::MappingKind::Streaming.into(),
            mapping_id: 9,
            iova: 0x1000,
            len_bytes: 4097,
            perm: v1::Perm::Read.into(),
            direction: v1::Direction::ToDevice.into(),
            session: "sessions/7".to_owned(),
            memory_id: 1,
            offset: 512,
            state: v1::MappingState::Live.into(),
            persistent: false,
            blocked_by: String::new(),
        }
    }

    fn coherent() -> v1::Mapping {
        v1::Mapping {
            kind: v1::MappingKind::Coherent.into(),
            mapping_id: 10,
            iova: 0x400_0000,
            len_bytes: 8192,
            perm: v1::Perm::ReadWrite.into(),
            state: v1::MappingState::Live.into(),
            persistent: true,
            ..v1::Mapping::default()
        }
    }

    fn direct() -> v1::Mapping {
        v1::Mapping {
            kind: v1::MappingKind::Direct.into(),
            iova: 0x800_0000,
            len_bytes: 4096,
            perm: v1::Perm::Write.into(),
            memory_id: 2,
            offset: 0x1000,
            state: v1::MappingState::Live.into(),
            persistent: true,
            ..v1::Mapping::default()
        }
    }

    fn style(format: Format) -> Style {
        Style {
            format,
            headers: true,
            now_ms: 0,
        }
    }

    #[test]
    fn mappings_are_lines_of_a_table() {
        let all = List::of(vec![mapping(), coherent(), direct()]);
        let text = all.text(&style(Format::Table));
        assert_eq!(
            text,
            "IOVA        LEN      ID   KIND        PERM         MEMORY   OFFSET   SESSION   STATE\n\
             0x1000      4097 B   9    streaming   read         1        0x200    7         live\n\
             0x4000000   8 KiB    10   coherent    read-write   -        -        -         live\n\
             0x8000000   4 KiB    -    direct      write        2        0x1000   -         live\n"
        );
    }

    #[test]
    fn every_column_has_a_header() {
        for format in [Format::Table, Format::Wide] {
            let style = style(format);
            let headers = <v1::Mapping as Row>::headers(&style);
            assert_eq!(headers.len(), mapping().cells(&style).len());
        }
    }

    #[test]
    fn the_range_ends_with_the_last_byte() {
        assert_eq!(more(&mapping())[0], "0x1000-0x2000");
        assert_eq!(more(&mapping())[1], "to-device");
    }

    #[test]
    fn what_is_in_quarantine_says_because_of_whom() {
        let quarantined = v1::Mapping {
            state: v1::MappingState::Quarantined.into(),
            blocked_by: "sessions/3".to_owned(),
            ..mapping()
        };
        let cells = quarantined.cells(&style(Format::Wide));
        assert_eq!(
            (cells[8].as_str(), cells[12].as_str()),
            ("quarantined", "3")
        );
        assert_eq!(more(&mapping())[3], "-");
    }

    #[test]
    fn names_stand_in_their_domain() {
        let list = List::within("domains/d0", vec![mapping()]);
        assert_eq!(list.names(), ["domains/d0/mappings/9"]);
        let one = One::within("domains/d0", coherent());
        assert_eq!(one.names(), ["domains/d0/mappings/10"]);
        let one = One::within("domains/d0", direct());
        let [name] = one.names().try_into().unwrap();
        assert_eq!(name, "domains/d0/mappings/0x8000000-0x8000fff");
        let typed = crate::range::parse_scoped(&name).expect("unmap takes it");
        assert_eq!(typed.domain.unwrap().as_str(), "d0");
    }
}
