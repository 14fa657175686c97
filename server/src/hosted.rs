//! One domain with its name, its owner and its share of the budget.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use domain_core::Domain;
use domain_core::addr::IovaRange;
use domain_core::domain::Settings;
use domain_core::layout::{ApertureKind, Layout};
use domain_core::session::SessionId;
use domaind_proto::names::DomainId;
use domaind_proto::v1;
use tokio_util::sync::CancellationToken;

use crate::budget::Share;
use crate::signal::Signal;
use crate::tenant::Tenant;

/// A domain as the daemon hosts it.
#[derive(Debug)]
pub(crate) struct Hosted {
    pub(crate) id: DomainId,
    /// Tells two domains apart that had the same name.
    pub(crate) uid: String,
    pub(crate) owner: Tenant,
    /// Stands in the configuration file.
    pub(crate) declared: bool,
    pub(crate) create_time_unix_ms: u64,
    pub(crate) core: Domain,
    /// Rung by `core` at every change.
    pub(crate) signal: Arc<Signal>,
    /// Sessions that have just ended, and are about to be found gone or not.
    pub(crate) parting: Parting,
    /// Called when it is not to be had by its name any more, whoever still has it.
    pub(crate) deleted: CancellationToken,
    /// Given back when the last session has let go of the domain. Below `core`,
    /// so that the memory is gone before its bytes count as free.
    pub(crate) share: Share,
}

/// Sessions that have just ended. Whoever waits for them waits a little longer:
/// of a process that was killed it is soon known that it is gone.
#[derive(Debug, Default)]
pub(crate) struct Parting(Mutex<BTreeSet<SessionId>>);

impl Parting {
    pub(crate) fn begin(&self, session: SessionId) {
        self.lock().insert(session);
    }

    pub(crate) fn end(&self, session: SessionId) {
        self.lock().remove(&session);
    }

    pub(crate) fn includes(&self, sessions: &[SessionId]) -> bool {
        let parting = self.lock();
        sessions.iter().any(|session| parting.contains(session))
    }

    fn lock(&self) -> MutexGuard<'_, BTreeSet<SessionId>> {
        // A set after a panic is still a set.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Hosted {
    pub(crate) fn view(&self) -> v1::Domain {
        let usage = self.core.usage();
        let (layout, settings) = (self.core.layout(), self.core.settings());
        // Of the same moment as the settings, which asking the core again is not.
        let direct_ranges = settings.restrictions.plan(layout);
        let direct_ranges = direct_ranges.expect("they are in force in this layout");
        v1::Domain {
            uid: self.uid.clone(),
            owner_uid: self.owner.uid,
            owner_pod_uid: self
                .owner
                .pod
                .map(|pod| pod.to_string())
                .unwrap_or_default(),
            declared: self.declared,
            create_time_unix_ms: self.create_time_unix_ms,
            usage: Some(usage.into()),
            max_mapping_bytes: usage.bounce.largest_hole_bytes,
            generation: usage.generation,
            direct_generation: usage.direct_generation,
            ..planned(&self.id, layout, &settings, &direct_ranges)
        }
    }
}

/// What a domain of this plan would be, before it is.
pub(crate) fn planned(
    id: &DomainId,
    layout: &Layout,
    settings: &Settings,
    direct_ranges: &[IovaRange],
) -> v1::Domain {
    let ranges = |ranges: &[IovaRange]| ranges.iter().map(|range| (*range).into()).collect();
    let aperture = |kind| layout.aperture(kind);
    let bytes = |kind| {
        aperture(kind)
            .and_then(|range| range.len_bytes())
            .unwrap_or(0)
    };
    v1::Domain {
        name: id.name(),
        bounce_bytes: bytes(ApertureKind::Bounce),
        coherent_bytes: bytes(ApertureKind::Coherent),
        bounce: aperture(ApertureKind::Bounce).map(Into::into),
        coherent: aperture(ApertureKind::Coherent).map(Into::into),
        iova_limit: layout.limit().get(),
        granule_bytes: layout.granule().bytes(),
        backing: v1::Backing::from(layout.backing()).into(),
        scrub: v1::Scrub::from(settings.scrub).into(),
        quotas: Some(settings.quotas.into()),
        reserved: ranges(settings.restrictions.reserved()),
        allowed: ranges(settings.restrictions.allowed()),
        direct_ranges: ranges(direct_ranges),
        ..v1::Domain::default()
    }
}

/// Milliseconds since 1970, for people to look at; nothing depends on it.
pub(crate) fn now_unix_ms() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
