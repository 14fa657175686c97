//! Sheets of keys and values, as `describe` prints them.

/// Keys and values, one a line, some of them under a title.
#[derive(Debug, Default)]
pub(crate) struct Sheet {
    lines: Vec<Line>,
}

#[derive(Debug)]
enum Line {
    Title(String),
    Value {
        key: String,
        value: String,
        indent: usize,
    },
    /// Stands under the value before it.
    More(String),
    /// Goes under the last title as it is.
    Block(String),
}

const INDENT: usize = 2;
/// Between the longest key, with its colon, and the values.
const GAP: usize = 2;

impl Sheet {
    /// A line of its own.
    pub(crate) fn value(&mut self, key: &str, value: impl ToString) -> &mut Sheet {
        self.push(key, value, 0)
    }

    /// What comes under it is told with [`Sheet::under`].
    pub(crate) fn title(&mut self, title: &str) -> &mut Sheet {
        self.lines.push(Line::Title(title.to_owned()));
        self
    }

    /// A line under the last title.
    pub(crate) fn under(&mut self, key: &str, value: impl ToString) -> &mut Sheet {
        self.push(key, value, INDENT)
    }

    /// A further value of the last line, in a line of its own.
    pub(crate) fn more(&mut self, value: impl ToString) -> &mut Sheet {
        self.lines.push(Line::More(value.to_string()));
        self
    }

    /// Lines under the last title that have their own alignment.
    pub(crate) fn block(&mut self, text: &str) -> &mut Sheet {
        self.lines.push(Line::Block(text.to_owned()));
        self
    }

    fn push(&mut self, key: &str, value: impl ToString, indent: usize) -> &mut Sheet {
        self.lines.push(Line::Value {
            key: format!("{key}:"),
            value: value.to_string(),
            indent,
        });
        self
    }

    /// All values start in one column.
    pub(crate) fn render(&self) -> String {
        let column = self.lines.iter().map(Line::key_width).max().unwrap_or(0) + GAP;
        self.lines.iter().map(|line| line.render(column)).collect()
    }
}

impl Line {
    fn key_width(&self) -> usize {
        match self {
            Line::Value { key, indent, .. } => indent + key.len(),
            Line::Title(_) | Line::More(_) | Line::Block(_) => 0,
        }
    }

    fn render(&self, column: usize) -> String {
        match self {
            Line::Title(title) => format!("{title}:\n"),
            Line::Value { key, value, indent } => {
                let width = column - indent;
                format!("{:indent$}{key:width$}{value}\n", "")
            }
            Line::More(value) => format!("{:column$}{value}\n", ""),
            Line::Block(text) => {
                let indented = |line: &str| format!("{:INDENT$}{line}\n", "");
                text.lines().map(indented).collect()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_values_start_in_one_column() {
        let mut sheet = Sheet::default();
        sheet.value("Name", "d0").title("Bounce");
        sheet.under("Largest hole", 7).more(8).block("A  B\n1  2\n");
        assert_eq!(
            sheet.render(),
            "Name:            d0\nBounce:\n  Largest hole:  7\n                 8\n  A  B\n  1  2\n"
        );
    }
}
