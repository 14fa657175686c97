//! Waiting for conditions, with a deadline.

use std::future::Future;
use std::time::{Duration, Instant};

/// How long anything may take. Generous: the tests share two cores.
pub const DEADLINE: Duration = Duration::from_secs(20);
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(5);

/// Waits until `look` finds something.
///
/// # Panics
/// When the deadline has passed.
#[track_caller]
pub fn find<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let until = Instant::now() + DEADLINE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < until, "gave up waiting for {what}");
        std::thread::sleep(PAUSE);
    }
}

/// Waits until `look` says yes.
///
/// # Panics
/// When the deadline has passed.
#[track_caller]
pub fn until(what: &str, mut look: impl FnMut() -> bool) {
    find(what, || look().then_some(()));
}

/// Waits until `look` answers what is wanted; a failure shows what it answered.
///
/// # Panics
/// When the deadline has passed.
pub async fn until_equal<T, F>(what: &str, wanted: T, mut look: impl FnMut() -> F)
where
    T: PartialEq + std::fmt::Debug,
    F: Future<Output = T>,
{
    let until = Instant::now() + DEADLINE;
    loop {
        let seen = look().await;
        if seen == wanted {
            return;
        }
        assert!(
            Instant::now() < until,
            "gave up waiting for {what}: it is {seen:?} and shall be {wanted:?}"
        );
        tokio::time::sleep(PAUSE).await;
    }
}

/// Bounds a future that must come to its end by itself.
///
/// # Panics
/// When it does not.
pub async fn soon<F: Future>(what: &str, future: F) -> F::Output {
    match tokio::time::timeout(DEADLINE, future).await {
        Ok(output) => output,
        Err(_) => panic!("{what} did not come within {DEADLINE:?}"),
    }
}
