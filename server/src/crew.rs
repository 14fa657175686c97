//! Threads that copy parts of large batches at the same time.
//!
//! A few of them fill what memory can do, and more would only take cores from
//! those whose buffers they copy. They are there once there was a large batch, and
//! sleep until the next one.

use std::num::NonZero;
use std::sync::{LazyLock, OnceLock};
use std::thread::available_parallelism;

use domain_core::crew::{Crew, Part};
use rayon_core::{ThreadPool, ThreadPoolBuilder};

use crate::offload::{LARGE_BYTES, yielding};

/// Bytes of a part at least.
const PART_BYTES: u64 = 512 << 10;
/// Threads that copy one batch, its own included.
const MOST: usize = 4;

/// The threads of this process.
#[derive(Debug)]
pub(crate) struct Copiers {
    /// Threads that copy one batch, its own included.
    most: usize,
    /// `None`: they could not be started, and each batch is copied by its own thread.
    pool: OnceLock<Option<ThreadPool>>,
}

impl Copiers {
    fn new(most: usize) -> Copiers {
        Copiers {
            most,
            pool: OnceLock::new(),
        }
    }

    /// Those that all batches share.
    pub(crate) fn shared() -> &'static Copiers {
        static SHARED: LazyLock<Copiers> = LazyLock::new(|| {
            let cores = available_parallelism().map_or(1, NonZero::get);
            Copiers::new(cores.min(MOST))
        });
        &SHARED
    }

    fn pool(&self) -> Option<&ThreadPool> {
        let start = || {
            let threads = self.most.checked_sub(1).filter(|threads| *threads > 0)?;
            let builder = ThreadPoolBuilder::new().num_threads(threads);
            let started = builder.thread_name(|index| format!("copy-{index}")).build();
            let warn = |error: &_| tracing::warn!(%error, "large batches are copied by one thread");
            started.inspect_err(warn).ok()
        };
        self.pool.get_or_init(start).as_ref()
    }
}

impl Crew for Copiers {
    fn attend(&self, bytes: u64, work: &mut dyn FnMut()) {
        yielding(bytes > LARGE_BYTES, work);
    }

    /// To wake another thread takes as long as it takes to copy some hundred KiB.
    fn parts(&self, bytes: u64) -> usize {
        if bytes < LARGE_BYTES {
            return 1;
        }
        let parts = usize::try_from(bytes / PART_BYTES).unwrap_or(usize::MAX);
        parts.min(self.most)
    }

    fn run(&self, parts: Vec<Part<'_>>) {
        let mut parts = parts.into_iter();
        let Some(own) = parts.next() else { return };
        match self.pool() {
            // The first part is this thread's; it waits for the others then.
            Some(pool) => pool.in_place_scope(|scope| {
                parts.for_each(|part| scope.spawn(move |_| part()));
                own();
            }),
            None => {
                own();
                parts.for_each(|part| part());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    use super::*;

    fn counting(done: &AtomicUsize, count: usize) -> Vec<Part<'_>> {
        let part = |_| -> Part<'_> { Box::new(|| _ = done.fetch_add(1, Relaxed)) };
        (0..count).map(part).collect()
    }

    #[test]
    fn all_parts_are_run_however_many_threads_there_are() {
        for most in [1, 2, 4] {
            let copiers = Copiers::new(most);
            for count in [0, 1, 7] {
                let done = AtomicUsize::new(0);
                copiers.run(counting(&done, count));
                assert_eq!(done.into_inner(), count);
            }
        }
    }

    #[test]
    fn parts_run_at_the_same_time() {
        let copiers = Copiers::new(2);
        // Neither gets past it alone.
        let both = Barrier::new(2);
        let meet = |_| -> Part<'_> { Box::new(|| _ = both.wait()) };
        copiers.run((0..2).map(meet).collect());
    }

    #[test]
    fn short_batches_are_not_divided_and_long_ones_into_parts_that_are_worth_it() {
        let copiers = Copiers::new(4);
        assert_eq!(copiers.parts(LARGE_BYTES - 1), 1);
        assert_eq!(copiers.parts(LARGE_BYTES), 2);
        assert_eq!(copiers.parts(64 << 20), 4);
        assert_eq!(Copiers::new(1).parts(64 << 20), 1);
    }

    #[test]
    #[should_panic(expected = "a part fails")]
    fn a_part_that_panics_is_not_hidden() {
        let copiers = Copiers::new(2);
        let part = |index| -> Part<'_> { Box::new(move || assert!(index == 0, "a part fails")) };
        copiers.run((0..2).map(part).collect());
    }
}
