//! Requests of one entry, stopped between their steps.

use super::*;
use crate::crew::Alone;
use crate::domain::transit::{Draining, Making, Syncing};

const ALL: BatchMode = BatchMode::AllOrNothing;

/// A map of the driver that has taken its iovas and copied nothing yet.
pub(super) fn reserved(domain: &Domain, spec: MapSpec) -> Making<'_> {
    let reserved = Making::reserve(domain, DRIVER, &[spec], ALL, Vec::new());
    reserved.unwrap_or_else(|refused| panic!("{refused}"))
}

/// The same when it has copied.
pub(super) fn filled(domain: &Domain, spec: MapSpec) -> Making<'_> {
    let mut made = reserved(domain, spec);
    made.fill(ALL, &Alone).unwrap();
    made
}

/// Its last step.
pub(super) fn go_live(mut made: Making<'_>) -> Result<Mapped, MapError> {
    made.go_live(ALL).map_err(|refused| refused.error)?;
    made.finish().remove(0).map(|made| made.mapped())
}

/// An unmap of the driver that is hidden and has copied nothing yet.
pub(super) fn draining(domain: &Domain, spec: UnmapSpec) -> Draining<'_> {
    draining_by(domain, DRIVER, spec)
}

pub(super) fn draining_by(domain: &Domain, session: SessionId, spec: UnmapSpec) -> Draining<'_> {
    let mut draining = Draining::new(domain, session, Vec::new());
    draining.hide(&mut domain.lock(), &[spec], ALL).unwrap();
    draining
}

/// Its last step but the answer.
pub(super) fn copy_back(draining: &mut Draining<'_>) -> Result<(), UnmapError> {
    let copied = draining.copy_back(ALL, &Alone);
    copied.map_err(|refused| refused.error)
}

/// Its last step.
pub(super) fn ended(domain: &Domain, mut draining: Draining<'_>) -> u64 {
    draining.end(domain.lock(), &Alone);
    draining.finish().remove(0).unwrap().bytes_back
}

/// A sync of the driver that has been let in and has copied nothing yet.
pub(super) fn syncing(domain: &Domain, spec: SyncSpec) -> Syncing<'_> {
    let syncing = Syncing::begin(domain, DRIVER, &[spec], ALL, Vec::new());
    syncing.unwrap_or_else(|refused| panic!("{refused}"))
}

pub(super) fn copy(syncing: &mut Syncing<'_>) {
    syncing.copy(ALL).unwrap();
}
