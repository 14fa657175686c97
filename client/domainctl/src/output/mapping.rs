//! Mappings and allocations as people see them.

use domain_core::addr::Iova;
use domaind_proto::v1;

use super::domain::hex_range;
use super::list::Row;
use super::{Style, bare, word, yes_no};
use crate::size::human;

impl Row for v1::Mapping {
    const PLURAL: &'static str = "mappings";

    fn headers(style: &Style) -> Vec<&'static str> {
        let mut headers = vec!["IOVA", "LEN", "ID", "KIND", "DIRECTION", "SESSION", "STATE"];
        if style.wide() {
            headers.extend(["RANGE", "PERM", "MEMORY", "OFFSET", "PERSISTENT"]);
        }
        headers
    }

    fn cells(&self, style: &Style) -> Vec<String> {
        let mut cells = vec![
            Iova::new(self.iova).to_string(),
            human(self.len_bytes),
            self.mapping_id.to_string(),
            word(self.kind().as_str_name(), "MAPPING_KIND_"),
            word(self.direction().as_str_name(), "DIRECTION_"),
            bare(&self.session).to_owned(),
            word(self.state().as_str_name(), "MAPPING_STATE_"),
        ];
        if style.wide() {
            cells.extend(more(self));
        }
        cells
    }

    fn name(&self) -> String {
        format!("mappings/{}", self.mapping_id)
    }
}

/// What stands under the wide headers.
fn more(mapping: &v1::Mapping) -> [String; 5] {
    let last = mapping.iova.saturating_add(mapping.len_bytes.max(1) - 1);
    let streaming = mapping.kind() == v1::MappingKind::Streaming;
    let of_streaming = |number: String| if streaming { number } else { "-".to_owned() };
    [
        hex_range(mapping.iova, last),
        word(mapping.perm().as_str_name(), "PERM_"),
        of_streaming(mapping.memory_id.to_string()),
        of_streaming(format!("{:#x}", mapping.offset)),
        yes_no(mapping.persistent).to_owned(),
    ]
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

    fn style(format: Format) -> Style {
        Style {
            format,
            headers: true,
            now_ms: 0,
        }
    }

    #[test]
    fn mappings_are_lines_of_a_table() {
        let text = List::of(vec![mapping(), coherent()]).text(&style(Format::Table));
        assert_eq!(
            text,
            "IOVA        LEN      ID   KIND        DIRECTION   SESSION   STATE\n\
             0x1000      4097 B   9    streaming   to-device   7         live\n\
             0x4000000   8 KiB    10   coherent    -           -         live\n"
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
        assert_eq!(more(&coherent())[2], "-");
    }

    #[test]
    fn names_stand_in_their_domain() {
        let list = List::within("domains/d0", vec![mapping()]);
        assert_eq!(list.names(), ["domains/d0/mappings/9"]);
        let one = One::within("domains/d0", coherent());
        assert_eq!(one.names(), ["domains/d0/mappings/10"]);
    }
}
