//! Mappings in transit: guards that undo on drop what a request had reached.
//!
//! A guard that is dropped takes the domain's lock, so none is ever dropped while it is held: one
//! that is filled under the lock is made before the lock is taken.

use std::sync::MutexGuard;

use super::Domain;
use super::state::{DrainJob, FillJob, State, SyncJob};
use crate::addr::Iova;
use crate::batch::{BatchError, BatchMode, Step, advance, settle};
use crate::crew::{Alone, Crew};
use crate::layout::{ApertureKind, Layout};
use crate::limits::WATCH_CHANGE_ITEMS;
use crate::mapping::Phase;
use crate::session::{Denied, SessionId};
use crate::streaming::{MapError, MapSpec, Mapped, SyncError, SyncSpec, UnmapError, UnmapSpec};

/// Coherent memory or a lease that is being made. Dropping it gives everything back.
pub(super) struct Reservation<'d> {
    domain: &'d Domain,
    pub(super) job: FillJob,
    armed: bool,
}

impl<'d> Reservation<'d> {
    pub(super) fn new(domain: &'d Domain, job: FillJob) -> Reservation<'d> {
        Reservation {
            domain,
            job,
            armed: true,
        }
    }

    /// Makes it visible, and itself harmless if that succeeded.
    pub(super) fn go_live(&mut self, state: &mut State) -> Result<(), Denied> {
        state.go_live(&self.domain.layout, self.job.at, &mut None)?;
        self.armed = false;
        Ok(())
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        if self.armed {
            self.domain.give_back(&[self.job.at], false);
        }
    }
}

/// Streaming mappings of one batch that are being made. Dropping it gives back what is not live.
pub(super) struct Making<'d> {
    domain: &'d Domain,
    entries: Vec<Result<Made, MapError>>,
}

/// One of them.
#[derive(Debug)]
pub(super) struct Made {
    pub(super) job: FillJob,
    stage: Stage,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Reserved,
    /// Bytes of the driver may lie in it.
    Touched,
    Live,
}

impl<'d> Making<'d> {
    /// Takes iovas for all of a batch. `room` is empty, and may have room.
    pub(super) fn reserve(
        domain: &'d Domain,
        session: SessionId,
        specs: &[MapSpec],
        mode: BatchMode,
        room: Vec<Result<Made, MapError>>,
    ) -> Result<Making<'d>, BatchError<MapError>> {
        let mut making = Making {
            domain,
            entries: room,
        };
        let mut state = domain.lock();
        let mut admission = state.admission(session);
        for spec in specs {
            let reserved = state.reserve_streaming(&domain.layout, &mut admission, spec);
            let is_refused = reserved.is_err();
            making.entries.push(reserved.map(|job| Made {
                job,
                stage: Stage::Reserved,
            }));
            if is_refused && mode == BatchMode::AllOrNothing {
                break;
            }
        }
        drop(state);
        settle(mode, &mut making.entries)?;
        Ok(making)
    }

    /// Copies in, or zeroes.
    pub(super) fn fill(
        &mut self,
        mode: BatchMode,
        crew: &dyn Crew,
    ) -> Result<(), BatchError<MapError>> {
        let domain = self.domain;
        let aperture = domain.aperture(ApertureKind::Bounce);
        let step = Step {
            weight: |made: &Made| made.job.granules.len_bytes().unwrap_or(u64::MAX),
            take: |made: &mut Made| {
                made.stage = Stage::Touched;
                let FillJob {
                    bounce,
                    granules,
                    visible,
                    ..
                } = &made.job;
                let bounce = bounce.as_ref().expect("a streaming mapping");
                let aperture = aperture.expect("checked when it was reserved");
                bounce.fill(aperture, *granules, *visible)
            },
            undo: |made: Made| domain.give_back(&[made.job.at], true),
        };
        advance(mode, crew, &mut self.entries, &step)
    }

    /// Makes them visible, as many in one generation as watchers can be told of at once.
    pub(super) fn go_live(&mut self, mode: BatchMode) -> Result<(), BatchError<MapError>> {
        let domain = self.domain;
        let mut late = Vec::new();
        let mut state = domain.lock();
        for run in self.entries.chunks_mut(WATCH_CHANGE_ITEMS) {
            state.show_all(run, &domain.layout, &mut late);
        }
        drop(state);
        // Not even a file that nobody else knows any more is closed under the lock.
        for made in late {
            domain.give_back(&[made.job.at], made.stage == Stage::Touched);
        }
        settle(mode, &mut self.entries)
    }

    /// What became of each.
    pub(super) fn finish(mut self) -> Vec<Result<Made, MapError>> {
        std::mem::take(&mut self.entries)
    }

    #[cfg(test)]
    pub(super) fn first(&mut self) -> &mut Made {
        self.nth(0)
    }

    #[cfg(test)]
    pub(super) fn nth(&mut self, index: usize) -> &mut Made {
        self.entries[index].as_mut().unwrap()
    }
}

impl Made {
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

impl State {
    /// Makes mappings visible in one generation; takes out those whose session has ended, or whose
    /// aperture was reset meanwhile.
    fn show_all(
        &mut self,
        run: &mut [Result<Made, MapError>],
        layout: &Layout,
        late: &mut Vec<Made>,
    ) {
        let mut shown = self.showing();
        for entry in run {
            let Ok(made) = entry else { continue };
            match self.show(layout, made.job.at, &mut made.job.bounce, &mut shown) {
                Ok(()) => made.stage = Stage::Live,
                Err(denied) => late.extend(std::mem::replace(entry, Err(denied.into()))),
            }
        }
        self.shown(shown);
    }
}

impl Drop for Making<'_> {
    fn drop(&mut self) {
        // What was taken first is given back last, and the corrected batch gets it again.
        let mut touched = false;
        let mut keys = Vec::new();
        for made in self.entries.iter().flatten().rev() {
            if made.stage != Stage::Live {
                touched |= made.stage == Stage::Touched;
                keys.push(made.job.at);
            }
        }
        if !keys.is_empty() {
            self.domain.give_back(&keys, touched);
        }
    }
}

/// Streaming mappings of one batch that are being ended. Dropping it puts them back.
pub(super) struct Draining<'d> {
    domain: &'d Domain,
    session: SessionId,
    entries: Vec<Result<DrainJob, UnmapError>>,
    armed: bool,
}

impl<'d> Draining<'d> {
    /// Nothing yet. `room` is empty, and may have room.
    pub(super) fn new(
        domain: &'d Domain,
        session: SessionId,
        room: Vec<Result<DrainJob, UnmapError>>,
    ) -> Draining<'d> {
        Draining {
            domain,
            session,
            entries: room,
            armed: true,
        }
    }

    /// Takes all of a batch out of sight, in one generation.
    pub(super) fn hide(
        &mut self,
        state: &mut State,
        specs: &[UnmapSpec],
        mode: BatchMode,
    ) -> Result<(), BatchError<UnmapError>> {
        let allowed = state.driver(self.session);
        for spec in specs {
            let marked = allowed.map_err(UnmapError::from);
            let marked = marked.and_then(|()| state.mark_draining(self.session, spec));
            let is_refused = marked.is_err();
            self.entries.push(marked);
            if is_refused && mode == BatchMode::AllOrNothing {
                break;
            }
        }
        if let Err(refused) = settle(mode, &mut self.entries) {
            for job in self.entries.drain(..).flatten() {
                state.unmark_draining(job);
            }
            return Err(refused);
        }
        state.hide_marked(self.entries.iter_mut().flatten());
        Ok(())
    }

    /// Is there anything to copy back?
    pub(super) fn copies_back(&self) -> bool {
        let jobs = self.entries.iter().flatten();
        jobs.into_iter().any(|job| job.bytes_back > 0)
    }

    pub(super) fn copy_back(
        &mut self,
        mode: BatchMode,
        crew: &dyn Crew,
    ) -> Result<(), BatchError<UnmapError>> {
        let domain = self.domain;
        let aperture = domain.aperture(ApertureKind::Bounce);
        let step = Step {
            weight: |job: &DrainJob| job.bytes_back,
            take: |job: &mut DrainJob| {
                if job.bytes_back == 0 {
                    return Ok(());
                }
                let bounce = job.bounce.as_ref().expect("hidden with its transfer");
                let aperture = aperture.expect("it was mapped there");
                bounce.copy_back(aperture, job.iova, job.bytes_back)
            },
            undo: |mut job: DrainJob| domain.put_back(std::iter::once(&mut job)),
        };
        advance(mode, crew, &mut self.entries, &step)
    }

    /// They have ended: their granules wait until nobody can still use them.
    pub(super) fn end(&mut self, mut state: MutexGuard<'_, State>, crew: &dyn Crew) {
        let scrub = self.domain.is_poisoned() || state.scrubs_what_it_frees(self.session);
        let keys = self.entries.iter().flatten().map(|job| job.at);
        state.end_hidden(self.session, keys, scrub);
        self.armed = false;
        self.domain.settle_with(crew, state, Vec::new());
    }

    /// What became of each.
    pub(super) fn finish(mut self) -> Vec<Result<DrainJob, UnmapError>> {
        std::mem::take(&mut self.entries)
    }
}

impl Drop for Draining<'_> {
    fn drop(&mut self) {
        if self.armed {
            self.domain.put_back(self.entries.iter_mut().flatten());
        }
    }
}

/// Live mappings of which parts are being copied. Dropping it lets go of the granules.
pub(super) struct Syncing<'d> {
    domain: &'d Domain,
    entries: Vec<Result<SyncJob, SyncError>>,
    /// What was let in counts as being copied.
    armed: bool,
}

impl<'d> Syncing<'d> {
    /// Lets all of a batch in. `room` is empty, and may have room.
    pub(super) fn begin(
        domain: &'d Domain,
        session: SessionId,
        specs: &[SyncSpec],
        mode: BatchMode,
        room: Vec<Result<SyncJob, SyncError>>,
    ) -> Result<Syncing<'d>, BatchError<SyncError>> {
        let mut syncing = Syncing {
            domain,
            entries: room,
            armed: false,
        };
        let mut state = domain.lock();
        let check = |spec| state.check_sync(session, spec);
        syncing.entries.extend(specs.iter().map(check));
        settle(mode, &mut syncing.entries)?;
        for job in syncing.entries.iter().flatten() {
            state.held_mut(job.at).syncs += 1;
        }
        syncing.armed = true;
        drop(state);
        Ok(syncing)
    }

    /// In their order: parts may overlap.
    pub(super) fn copy(&mut self, mode: BatchMode) -> Result<(), BatchError<SyncError>> {
        let domain = self.domain;
        let aperture = domain.aperture(ApertureKind::Bounce);
        let step = Step {
            weight: |job: &SyncJob| job.part.len_bytes,
            take: |job: &mut SyncJob| {
                let aperture = aperture.expect("it was mapped there");
                job.bounce.sync(aperture, job.iova, job.part)
            },
            undo: |job: SyncJob| domain.end_syncs(std::iter::once(&job)),
        };
        advance(mode, &Alone, &mut self.entries, &step)
    }

    /// What became of each.
    pub(super) fn finish(mut self) -> Vec<Result<SyncJob, SyncError>> {
        self.domain.end_syncs(self.entries.iter().flatten());
        self.armed = false;
        std::mem::take(&mut self.entries)
    }
}

impl Drop for Syncing<'_> {
    fn drop(&mut self) {
        if self.armed {
            self.domain.end_syncs(self.entries.iter().flatten());
        }
    }
}

/// What guards undo. Nothing in a domain that has failed: they call this while a panic unwinds, and
/// a second panic would end the process.
impl Domain {
    /// Shows again what was hidden; what cannot be shown has ended.
    fn put_back<'j>(&self, jobs: impl Iterator<Item = &'j mut DrainJob>) {
        let Ok(mut state) = self.state.lock() else {
            return;
        };
        let mut ended: Vec<Iova> = Vec::new();
        for job in jobs {
            let put_back = state.go_live(&self.layout, job.at, &mut job.bounce);
            // Its session ended meanwhile, or the aperture was reset.
            ended.extend(put_back.is_err().then_some(job.at));
        }
        drop(state);
        self.retire(&ended, None, |_| true);
    }

    /// Nobody copies there any more.
    fn end_syncs<'j>(&self, jobs: impl Iterator<Item = &'j SyncJob>) {
        let Ok(mut state) = self.state.lock() else {
            return;
        };
        let mut abandoned: Vec<Iova> = Vec::new();
        for job in jobs {
            let held = state.held_mut(job.at);
            held.syncs -= 1;
            // The session ended while this was copying.
            let is_abandoned = held.syncs == 0 && held.phase == Phase::Draining;
            abandoned.extend(is_abandoned.then_some(job.at));
        }
        drop(state);
        self.retire(&abandoned, None, |_| true);
    }
}
