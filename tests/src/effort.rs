//! How much a random test tries.

/// So many times what a test usually does: for the night.
const TEST_ROUNDS: &str = "DOMAIND_TEST_ROUNDS";

/// How many rounds a test shall do that usually does so many.
///
/// # Panics
/// If `DOMAIND_TEST_ROUNDS` is not a number.
#[must_use]
pub fn rounds(usual: u64) -> u64 {
    match std::env::var(TEST_ROUNDS) {
        Ok(times) => usual * times.parse::<u64>().expect("DOMAIND_TEST_ROUNDS"),
        Err(_) => usual,
    }
}
