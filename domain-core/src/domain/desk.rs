//! Where batches are worked on.

use super::state::{DrainJob, SyncJob};
use super::transit::Made;
use crate::streaming::{MapError, Mapped, SyncError, UnmapError};

/// Room for batches: kept from one to the next by whoever makes many, so that a batch no larger than
/// one before it allocates nothing. Between two batches there is nothing on it but the answers of
/// the last one of each kind.
#[derive(Debug, Default)]
pub struct Desk {
    pub(super) map: Room<Made, Mapped, MapError>,
    pub(super) unmap: Room<DrainJob, u64, UnmapError>,
    pub(super) sync: Room<SyncJob, (), SyncError>,
}

#[derive(Debug)]
pub(super) struct Room<J, A, E> {
    pub(super) jobs: Vec<Result<J, E>>,
    /// One per entry, in the order of the request.
    pub(super) answers: Vec<Result<A, E>>,
}

impl<J, A, E> Default for Room<J, A, E> {
    fn default() -> Room<J, A, E> {
        Room {
            jobs: Vec::new(),
            answers: Vec::new(),
        }
    }
}
