//! Touching all memory of a domain, as whoever wonders who pays for it would.

use std::sync::atomic::Ordering;

use anyhow::Context;
use domain_core::addr::{Iova, IovaRange};
use domaind_client::blocking::Session;

use crate::demo::transform::CHUNK_BYTES;

/// Pages are no smaller anywhere.
const PAGE_BYTES: usize = 4096;

/// Reads every byte and writes to every page, adding 0 to a word: whatever others
/// do there at the same time is not disturbed. Answers how many bytes there are.
pub(super) fn all(session: &Session) -> anyhow::Result<u64> {
    let mut touched = 0;
    for aperture in [session.bounce(), session.coherent()].into_iter().flatten() {
        touched += one(session, aperture)?;
    }
    Ok(touched)
}

fn one(session: &Session, aperture: IovaRange) -> anyhow::Result<u64> {
    // The first granule of a space that begins at 0 is nobody's.
    let skipped = match aperture.start() == Iova::new(0) {
        true => session.granule().bytes(),
        false => 0,
    };
    let len_bytes = aperture
        .len_bytes()
        .context("an aperture of all addresses")?;
    let at = |offset: u64| {
        let place = aperture.start().checked_add(offset);
        place.context("an aperture that leaves the address space")
    };
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut offset = skipped;
    while offset < len_bytes {
        let left = usize::try_from(len_bytes - offset).unwrap_or(CHUNK_BYTES);
        let part = &mut chunk[..CHUNK_BYTES.min(left)];
        session.read(at(offset)?, part)?;
        for page in (offset..offset + part.len() as u64).step_by(PAGE_BYTES) {
            session
                .word64_mut(at(page)?)?
                .fetch_add(0, Ordering::Relaxed);
        }
        offset += part.len() as u64;
    }
    Ok(len_bytes - skipped)
}
