//! Progress of work that takes long, for people at a terminal.

use std::io::{self, IsTerminal};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::cli::Format;

/// A bar on stderr; hidden where that is no terminal, and where the answer is
/// for a program.
pub(crate) fn bar(len: Option<u64>, template: &str, format: Format) -> ProgressBar {
    let quiet = !io::stderr().is_terminal() || !matches!(format, Format::Table | Format::Wide);
    let target = if quiet {
        ProgressDrawTarget::hidden()
    } else {
        ProgressDrawTarget::stderr()
    };
    let bar = ProgressBar::with_draw_target(len, target);
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}
