//! Who copies the bytes of a batch: the thread that asks, or several at a time.
//!
//! The core has no threads of its own. Whoever calls it lends it some: the result is the same, only
//! sooner.

/// A part of a batch's copies.
pub type Part<'w> = Box<dyn FnOnce() + Send + 'w>;

/// Threads that copy parts of a batch at the same time.
pub trait Crew: Sync {
    /// Runs `work`, which copies or overwrites so many bytes: the place to make sure that nobody
    /// waits for this thread meanwhile.
    fn attend(&self, bytes: u64, work: &mut dyn FnMut());

    /// Into how many parts a batch is to be divided that copies so many bytes.
    fn parts(&self, bytes: u64) -> usize;

    /// Runs all parts to their end, in any order and on any threads, and returns then.
    ///
    /// # Panics
    /// If one of them does.
    fn run(&self, parts: Vec<Part<'_>>);
}

/// Nobody but the calling thread.
#[derive(Clone, Copy, Debug)]
pub struct Alone;

impl Crew for Alone {
    fn attend(&self, _bytes: u64, work: &mut dyn FnMut()) {
        work();
    }

    fn parts(&self, _bytes: u64) -> usize {
        1
    }

    fn run(&self, parts: Vec<Part<'_>>) {
        parts.into_iter().for_each(|part| part());
    }
}
