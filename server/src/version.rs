//! Which build this is.

use std::sync::OnceLock;

/// Said by the program once. It does not stand in the library, which would have to be
/// compiled anew for each commit.
static COMMIT: OnceLock<&'static str> = OnceLock::new();

/// The version of this library, which is that of the program.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The program says which commit it was built from; the first word counts.
pub fn built_from(commit: &'static str) {
    let _ = COMMIT.set(commit);
}

/// Which commit that is, if the program knows.
#[must_use]
pub fn commit() -> Option<&'static str> {
    COMMIT.get().copied()
}
