//! `-o table` and `-o wide`: columns without borders, as in kubectl.

use comfy_table::Table;
use comfy_table::presets::NOTHING;

/// Aligns the rows, with a newline at the end of each.
///
/// Never wraps to the terminal's width: a line stays one record, for eyes and
/// for awk alike.
pub(super) fn render(headers: Option<&[&str]>, rows: &[Vec<String>]) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING).force_no_tty();
    if let Some(headers) = headers {
        table.set_header(headers.iter().copied());
    }
    table.add_rows(rows);
    for column in table.column_iter_mut() {
        column.set_padding((0, 3));
    }
    table.trim_fmt() + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_lines_end_where_their_text_ends() {
        let rows = [
            vec!["d0".into(), "1".into()],
            vec!["long".into(), "22".into()],
        ];
        assert_eq!(
            render(Some(&["NAME", "N"]), &rows),
            "NAME   N\nd0     1\nlong   22\n"
        );
        assert_eq!(render(None, &rows), "d0     1\nlong   22\n");
    }

    #[test]
    fn a_line_is_never_wrapped() {
        let long = "x".repeat(500);
        let text = render(None, &[vec![long.clone(), long]]);
        assert_eq!(text.lines().count(), 1);
    }
}
