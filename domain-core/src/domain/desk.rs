//! Where batches are worked on.

use super::state::{DrainJob, SyncJob};
use super::transit::Made;
use crate::streaming::{MapError, SyncError, UnmapError};

/// Room for batches: kept from one to the next by whoever makes many, so that a batch no larger than
/// one before it allocates nothing. Between two batches there is nothing on it.
#[derive(Debug, Default)]
pub struct Desk {
    pub(super) maps: Vec<Result<Made, MapError>>,
    pub(super) unmaps: Vec<Result<DrainJob, UnmapError>>,
    pub(super) syncs: Vec<Result<SyncJob, SyncError>>,
}

/// An iterator of answers that was leaked, and not dropped, leaves some of them behind.
impl Desk {
    pub(super) fn room_for_maps(&mut self) -> Vec<Result<Made, MapError>> {
        emptied(&mut self.maps)
    }

    pub(super) fn room_for_unmaps(&mut self) -> Vec<Result<DrainJob, UnmapError>> {
        emptied(&mut self.unmaps)
    }

    pub(super) fn room_for_syncs(&mut self) -> Vec<Result<SyncJob, SyncError>> {
        emptied(&mut self.syncs)
    }
}

fn emptied<T>(room: &mut Vec<T>) -> Vec<T> {
    room.clear();
    std::mem::take(room)
}
