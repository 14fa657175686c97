//! Mappings in transit: guards that undo on drop what a request had reached.
//!
//! A guard that is dropped takes the domain's lock, so none is ever dropped
//! while it is held.

use super::Domain;
use super::state::{DrainJob, FillJob, State, SyncJob};
use crate::addr::Iova;
use crate::layout::ApertureKind;
use crate::mapping::Phase;
use crate::session::Denied;
use crate::streaming::{MapError, Mapped, SyncError, UnmapError};

/// A mapping that is being made. Dropping it gives everything back.
pub(super) struct Reservation<'d> {
    pub(super) domain: &'d Domain,
    pub(super) job: FillJob,
    armed: bool,
    /// Bytes of the driver may lie in it.
    touched: bool,
}

impl<'d> Reservation<'d> {
    pub(super) fn new(domain: &'d Domain, job: FillJob) -> Reservation<'d> {
        Reservation {
            domain,
            job,
            armed: true,
            touched: false,
        }
    }

    pub(super) fn fill(mut self) -> Result<Self, MapError> {
        self.touched = true;
        let aperture = self.domain.held_aperture(ApertureKind::Bounce);
        let bounce = self.job.bounce.as_ref().expect("a streaming reservation");
        bounce.fill(aperture, self.job.granules, self.job.visible)?;
        Ok(self)
    }

    /// Makes it visible, and itself harmless if that succeeded.
    pub(super) fn go_live(&mut self, state: &mut State) -> Result<(), Denied> {
        state.go_live(&self.domain.layout, self.job.at)?;
        self.armed = false;
        Ok(())
    }

    pub(super) fn mapped(&self) -> Mapped {
        let visible = self.job.visible;
        let len_bytes = visible
            .len_bytes()
            .expect("an aperture is shorter than the space");
        Mapped {
            id: self.job.id,
            iova: visible.start(),
            len_bytes,
        }
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        if self.armed {
            self.domain.give_back(&[self.job.at], self.touched);
        }
    }
}

/// A streaming mapping that is being ended. Dropping it puts it back.
pub(super) struct Draining<'d> {
    pub(super) domain: &'d Domain,
    pub(super) job: DrainJob,
    pub(super) armed: bool,
}

impl Draining<'_> {
    pub(super) fn copy_back(self) -> Result<Self, UnmapError> {
        if self.job.bytes_back > 0 {
            let aperture = self.domain.held_aperture(ApertureKind::Bounce);
            self.job
                .bounce
                .copy_back(aperture, self.job.iova, self.job.bytes_back)?;
        }
        Ok(self)
    }

    /// Disarms; the key is for [`Domain::give_back`].
    pub(super) fn end(mut self) -> Iova {
        self.armed = false;
        self.job.at
    }
}

impl Drop for Draining<'_> {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        let Ok(mut state) = self.domain.state.lock() else {
            return;
        };
        let put_back = state.go_live(&self.domain.layout, self.job.at);
        drop(state);
        if put_back.is_err() {
            // Its session ended meanwhile.
            self.domain.retire(&[self.job.at], None, |_| true);
        }
    }
}

/// A mapping that a sync is copying. Dropping it lets go of the granules.
pub(super) struct Syncing<'d> {
    pub(super) domain: &'d Domain,
    pub(super) job: SyncJob,
}

impl Syncing<'_> {
    pub(super) fn copy(&self) -> Result<(), SyncError> {
        let aperture = self.domain.held_aperture(ApertureKind::Bounce);
        self.job.bounce.sync(aperture, self.job.iova, self.job.part)
    }
}

impl Drop for Syncing<'_> {
    fn drop(&mut self) {
        let Ok(mut state) = self.domain.state.lock() else {
            return;
        };
        let held = state.held_mut(self.job.at);
        held.syncs -= 1;
        // The session ended while this was copying.
        let abandoned = held.syncs == 0 && held.phase == Phase::Draining;
        drop(state);
        if abandoned {
            self.domain.retire(&[self.job.at], None, |_| true);
        }
    }
}
