//! Direct mappings and pieces of translations as people see them.

use domaind_proto::v1;

use super::list::{Row, rows};
use super::{Style, View, wire_range, word};
use domaind_proto::size::human;

/// A mapping just made; also an entry of a table for `set-map`.
impl Row for v1::DirectMapping {
    const PLURAL: &'static str = "mappings";

    fn headers(_style: &Style) -> Vec<&'static str> {
        vec!["RANGE", "LEN", "MEMORY", "OFFSET", "PERM"]
    }

    fn cells(&self, _style: &Style) -> Vec<String> {
        let len = self
            .range
            .map(|range| (range.last - range.start).saturating_add(1));
        vec![
            wire_range(self.range.as_ref()),
            human(len.unwrap_or(0)),
            self.memory_id.to_string(),
            format!("{:#x}", self.offset),
            word(self.perm().as_str_name(), "PERM_"),
        ]
    }

    /// Where it appears, as `unmap` takes it.
    fn name(&self) -> String {
        wire_range(self.range.as_ref())
    }
}

impl Row for v1::Piece {
    const PLURAL: &'static str = "pieces";

    fn headers(_style: &Style) -> Vec<&'static str> {
        vec!["RANGE", "KIND", "MEMORY", "OFFSET", "PERM"]
    }

    fn cells(&self, _style: &Style) -> Vec<String> {
        let memory = match self.kind() {
            v1::MappingKind::Direct => self.memory_id.to_string(),
            _ => "-".to_owned(),
        };
        vec![
            wire_range(self.range.as_ref()),
            word(self.kind().as_str_name(), "MAPPING_KIND_"),
            memory,
            format!("{:#x}", self.offset),
            word(self.perm().as_str_name(), "PERM_"),
        ]
    }

    fn name(&self) -> String {
        wire_range(self.range.as_ref())
    }
}

/// The pieces; programs also get the generation.
impl View for v1::TranslateResponse {
    fn text(&self, style: &Style) -> String {
        rows(&self.pieces, style)
    }

    fn names(&self) -> Vec<String> {
        self.pieces.iter().map(Row::name).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::One;
    use super::*;
    use crate::cli::Format;

    fn style(format: Format) -> Style {
        Style {
            format,
            headers: true,
            now_ms: 0,
        }
    }

    #[test]
    fn a_mapping_says_where_it_appears() {
        let mapping = v1::DirectMapping {
            range: Some(v1::IovaRange {
                start: 0x1000,
                last: 0x2fff,
            }),
            memory_id: 3,
            offset: 0x10000,
            perm: v1::Perm::ReadWrite.into(),
        };
        let one = One::of(mapping);
        assert_eq!(one.render(&style(Format::Name)).unwrap(), "0x1000-0x2fff\n");
        assert_eq!(
            one.render(&style(Format::Table)).unwrap(),
            "RANGE           LEN     MEMORY   OFFSET    PERM\n\
             0x1000-0x2fff   8 KiB   3        0x10000   read-write\n"
        );
    }

    #[test]
    fn pieces_are_lines_of_a_table() {
        let piece = |kind: v1::MappingKind, memory_id| v1::Piece {
            range: Some(v1::IovaRange {
                start: 0x1000,
                last: 0x1fff,
            }),
            kind: kind.into(),
            memory_id,
            offset: 0,
            perm: v1::Perm::Read.into(),
        };
        let translated = v1::TranslateResponse {
            pieces: vec![
                piece(v1::MappingKind::Coherent, 0),
                piece(v1::MappingKind::Direct, 3),
            ],
            generation: 7,
        };
        assert_eq!(
            translated.text(&style(Format::Table)),
            "RANGE           KIND       MEMORY   OFFSET   PERM\n\
             0x1000-0x1fff   coherent   -        0x0      read\n\
             0x1000-0x1fff   direct     3        0x0      read\n"
        );
    }
}
