//! Registered memories as people see them.

use domaind_proto::v1;

use super::list::Row;
use super::{Style, bare, yes_no};
use crate::size::human;

impl Row for v1::Memory {
    const PLURAL: &'static str = "memories";

    fn headers(_style: &Style) -> Vec<&'static str> {
        vec!["ID", "SIZE", "SESSION", "WRITABLE", "HUGETLB", "MAPPINGS"]
    }

    fn cells(&self, _style: &Style) -> Vec<String> {
        vec![
            self.memory_id.to_string(),
            human(self.size_bytes),
            bare(&self.session).to_owned(),
            yes_no(self.writable).to_owned(),
            yes_no(self.hugetlb).to_owned(),
            self.mappings.to_string(),
        ]
    }

    fn name(&self) -> String {
        format!("memories/{}", self.memory_id)
    }
}
