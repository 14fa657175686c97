//! `-o name`: one name a line, for xargs.

pub(super) fn render(names: &[String]) -> String {
    names.iter().map(|name| format!("{name}\n")).collect()
}
