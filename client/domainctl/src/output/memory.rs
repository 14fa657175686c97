//! Registered memories as people see them.

use domaind_proto::v1;

use super::list::Row;
use super::{Style, bare, yes_no};
use domaind_proto::size::human;

impl Row for v1::Memory {
    const PLURAL: &'static str = "memories";

    fn headers(_style: &Style) -> Vec<&'static str> {
        vec![
            "ID",
            "SIZE",
            "SESSION",
            "WRITABLE",
            "HUGETLB",
            "MAPPINGS",
            "DIRECT",
            "PERSISTENT",
        ]
    }

    fn cells(&self, _style: &Style) -> Vec<String> {
        vec![
            self.memory_id.to_string(),
            human(self.size_bytes),
            bare(&self.session).to_owned(),
            yes_no(self.writable).to_owned(),
            yes_no(self.hugetlb).to_owned(),
            self.mappings.to_string(),
            self.direct_mappings.to_string(),
            yes_no(self.session.is_empty()).to_owned(),
        ]
    }

    fn name(&self) -> String {
        format!("memories/{}", self.memory_id)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{List, View};
    use super::*;
    use crate::cli::Format;

    #[test]
    fn memory_of_no_session_is_the_domains_and_persistent() {
        let memory = |memory_id, session: &str| v1::Memory {
            memory_id,
            session: session.to_owned(),
            size_bytes: 4096,
            direct_mappings: 3,
            ..v1::Memory::default()
        };
        let list = List::of(vec![memory(1, "sessions/7"), memory(2, "")]);
        let style = Style {
            format: Format::Table,
            headers: true,
            now_ms: 0,
        };
        assert_eq!(
            list.text(&style),
            "ID   SIZE    SESSION   WRITABLE   HUGETLB   MAPPINGS   DIRECT   PERSISTENT\n\
             1    4 KiB   7         no         no        0          3        no\n\
             2    4 KiB   -         no         no        0          3        yes\n"
        );
    }
}
