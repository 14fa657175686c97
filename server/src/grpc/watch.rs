//! WatchDomain: what a domain shows, and then every change of it.
//!
//! Pulled, not pushed: nothing is kept for a watcher but how far it has come and
//! the one message that is next. The next one is looked for when the connection
//! has taken the one before, so who reads slowly costs nothing; the domain
//! remembers its last changes once for all watchers, and who comes too late for
//! them starts over.
//!
//! A large snapshot is read in parts, between which the domain goes on. Before a
//! part come the changes up to it of what was shown before, so that at every
//! moment everything shown is of one generation.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use domain_core::Domain;
use domain_core::addr::{Iova, IovaRange};
use domain_core::domain::{Change, Standing, Usage};
use domain_core::mapping::MappingView;
use domaind_proto::names::{DomainId, session_name};
use domaind_proto::v1::watch_domain_response::Event;
use domaind_proto::v1::{self, ErrorReason, Refusal};
use tokio::time::{Instant, sleep_until};
use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};

use crate::hosted::Hosted;
use crate::offload::bug;
use crate::registry::Missing;
use crate::signal::Changes;
use crate::streams::Watching;

/// Mappings of one part of a snapshot: some 40 KiB, read in one go of the
/// domain's lock.
const PART: usize = 500;
/// Between two looks at sessions and quarantine, which change with every removal.
const STATUS_PAUSE: Duration = Duration::from_millis(100);
/// Sessions that one status can name.
const STATUS_SESSIONS: usize = 4096;

/// One watcher of one domain.
#[derive(Debug)]
pub(super) struct Watcher {
    id: DomainId,
    /// Only lent while it is looked at: a watcher keeps no memory that others
    /// have given up.
    domain: Weak<Hosted>,
    changes: Changes,
    deleted: CancellationToken,
    stop: CancellationToken,
    view: View,
    statuses: Statuses,
    _watching: Watching,
}

/// What a watcher has been shown.
#[derive(Debug, Default)]
struct View {
    /// In which generation it is; `None` before a snapshot.
    generation: Option<u64>,
    /// Mappings that start from here on have not been shown; `None`: all have.
    unshown: Option<Iova>,
    /// The next part of a snapshot, behind the changes up to its generation.
    next: Option<Part>,
}

/// A part of a snapshot.
#[derive(Debug)]
struct Part {
    generation: u64,
    mappings: Vec<MappingView>,
    /// Where the next one begins.
    unshown: Option<Iova>,
}

/// What a watcher was told of sessions and quarantine.
#[derive(Debug, Default)]
struct Statuses {
    told: Option<Told>,
    /// Something may have changed since.
    is_stale: bool,
    /// When to look again; `None`: not before a snapshot is whole.
    due: Option<Instant>,
}

/// Of a status, what makes the next one worth telling.
#[derive(Debug, PartialEq, Eq)]
struct Told {
    sessions: usize,
    invalidating: usize,
    quarantined: domain_core::domain::Quarantined,
    fenced: usize,
    standings: Vec<Standing>,
}

impl Watcher {
    /// Begins to watch: behind `generation`, or with a snapshot.
    pub(super) fn new(
        domain: &Arc<Hosted>,
        generation: Option<u64>,
        watching: Watching,
        stop: CancellationToken,
    ) -> Watcher {
        // Before the first look, so that nothing is missed.
        let changes = domain.signal.subscribe();
        domain.core.watch();
        Watcher {
            id: domain.id.clone(),
            domain: Arc::downgrade(domain),
            changes,
            deleted: domain.deleted.clone(),
            stop,
            view: View {
                generation,
                ..View::default()
            },
            statuses: match generation {
                Some(_) => Statuses::due_at(Instant::now() + STATUS_PAUSE),
                None => Statuses::default(),
            },
            _watching: watching,
        }
    }

    /// The next event; waits until there is one. Cancelling loses none.
    ///
    /// # Errors
    /// `NOT_FOUND` when the domain is deleted, `UNAVAILABLE` when the daemon
    /// stops; nothing comes behind.
    async fn next(&mut self) -> Result<v1::WatchDomainResponse, Status> {
        loop {
            if self.stop.is_cancelled() {
                return Err(stopping().into());
            }
            if let Some(event) = self.look()? {
                return Ok(v1::WatchDomainResponse { event: Some(event) });
            }
            let due = self.statuses.due.filter(|_| self.statuses.is_stale);
            tokio::select! {
                () = self.stop.cancelled() => {}
                () = self.deleted.cancelled() => {}
                // That the domain is gone shows at the next look.
                _ = self.changes.changed() => self.statuses.is_stale = true,
                () = until(due) => {}
            }
        }
    }

    /// The next event, if there is one now.
    fn look(&mut self) -> Result<Option<Event>, Refusal> {
        let missing = || Refusal::from(Missing::Domain(self.id.clone()));
        if self.deleted.is_cancelled() {
            return Err(missing());
        }
        let domain = self.domain.upgrade().ok_or_else(missing)?;
        self.statuses.is_stale |= self.changes.seen();
        let Watcher { view, statuses, .. } = self;
        // A domain that has failed may be in any state, and a panic in here would
        // take the other calls of the connection with it.
        let look = AssertUnwindSafe(|| look(view, statuses, &domain.core));
        catch_unwind(look).map_err(|_| bug())
    }

    /// All its events, one pulled after the other.
    pub(super) fn events(self) -> Events {
        Events {
            pulling: Some(pull(self)),
        }
    }
}

fn look(view: &mut View, statuses: &mut Statuses, core: &Domain) -> Option<Event> {
    if let Some(status) = statuses.look(core) {
        return Some(Event::Status(status));
    }
    let event = view.look(core)?;
    match &event {
        Event::Resync(_) => *statuses = Statuses::default(),
        Event::Snapshot(part) if !part.more => *statuses = Statuses::due_at(Instant::now()),
        _ => {}
    }
    Some(event)
}

impl View {
    /// The next event; `None` if all is shown that there is.
    fn look(&mut self, core: &Domain) -> Option<Event> {
        let Some(shown) = self.generation else {
            return Some(self.show(Part::read(core, Iova::new(0))));
        };
        if self.next.is_none() {
            self.next = self.unshown.map(|from| Part::read(core, from));
        }
        if self
            .next
            .as_ref()
            .is_none_or(|part| part.generation > shown)
        {
            match core.changes(shown, 1) {
                Ok(changes) => {
                    if let Some(change) = changes.first() {
                        return Some(self.apply(change));
                    }
                }
                Err(lost) => {
                    *self = View::default();
                    let generation = lost.generation;
                    return Some(Event::Resync(v1::WatchResync { generation }));
                }
            }
        }
        let part = self.next.take()?;
        Some(self.show(part))
    }

    fn show(&mut self, part: Part) -> Event {
        let Part {
            generation,
            mappings,
            unshown,
        } = part;
        self.generation = Some(generation);
        self.unshown = unshown;
        Event::Snapshot(v1::WatchSnapshot {
            generation,
            mappings: mappings.into_iter().map(v1::Mapping::from).collect(),
            more: unshown.is_some(),
        })
    }

    /// Of what was not shown yet the part that is still to come tells.
    fn apply(&mut self, change: &Change) -> Event {
        let unshown = self.unshown;
        let is_shown = |range: IovaRange| unshown.is_none_or(|from| range.start() < from);
        self.generation = Some(change.generation);
        let added = change.added.iter().filter(|view| is_shown(view.visible));
        let removed = change.removed.iter().filter(|range| is_shown(**range));
        Event::Change(v1::WatchChange {
            generation: change.generation,
            added: added.copied().map(v1::Mapping::from).collect(),
            removed: removed.copied().map(v1::IovaRange::from).collect(),
        })
    }
}

impl Part {
    fn read(core: &Domain, from: Iova) -> Part {
        let (mut mappings, generation) = core.visible(from, PART + 1);
        let is_last = mappings.len() <= PART;
        mappings.truncate(PART);
        let last = mappings.last().filter(|_| !is_last);
        Part {
            generation,
            unshown: last.and_then(|last| last.visible.last().checked_add(1)),
            mappings,
        }
    }
}

impl Statuses {
    fn due_at(due: Instant) -> Statuses {
        Statuses {
            told: None,
            is_stale: true,
            due: Some(due),
        }
    }

    /// The next status, if it is time for one and it says anything new.
    fn look(&mut self, core: &Domain) -> Option<v1::WatchStatus> {
        let now = Instant::now();
        if !self.is_stale || self.due.is_none_or(|due| now < due) {
            return None;
        }
        self.is_stale = false;
        self.due = Some(now + STATUS_PAUSE);
        let usage = core.usage();
        let told = Told::of(&usage, core.standings());
        if self.told.as_ref() == Some(&told) {
            return None;
        }
        let sessions = told.standings.iter().map(session).collect();
        self.told = Some(told);
        Some(v1::WatchStatus {
            usage: Some(usage.into()),
            sessions,
        })
    }
}

impl Told {
    fn of(usage: &Usage, mut standings: Vec<Standing>) -> Told {
        standings.retain(|one| one.fenced || one.asked > one.acked || one.quarantined.mappings > 0);
        standings.truncate(STATUS_SESSIONS);
        Told {
            sessions: usage.sessions,
            invalidating: usage.invalidating,
            quarantined: usage.quarantined,
            fenced: usage.fenced,
            standings,
        }
    }
}

fn session(standing: &Standing) -> v1::WatchSession {
    v1::WatchSession {
        name: session_name(standing.session),
        fenced: standing.fenced,
        acked_generation: standing.acked,
        asked_generation: standing.asked,
        quarantined_mappings: standing.quarantined.mappings as u64,
    }
}

/// What ends a stream when the daemon stops.
pub(super) fn stopping() -> Refusal {
    Refusal::because(
        Code::Unavailable,
        ErrorReason::Draining,
        "the daemon is stopping",
    )
}

/// Waits until then; for ever if there is no such time.
async fn until(due: Option<Instant>) {
    match due {
        Some(due) => sleep_until(due).await,
        None => std::future::pending().await,
    }
}

type Pulled = (Watcher, Result<v1::WatchDomainResponse, Status>);
type Pulling = Pin<Box<dyn Future<Output = Pulled> + Send>>;

/// The events of a watcher, as tonic takes them; an error is the last.
pub(crate) struct Events {
    pulling: Option<Pulling>,
}

fn pull(mut watcher: Watcher) -> Pulling {
    Box::pin(async move {
        let event = watcher.next().await;
        (watcher, event)
    })
}

impl Stream for Events {
    type Item = Result<v1::WatchDomainResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Some(pulling) = &mut self.pulling else {
            return Poll::Ready(None);
        };
        let (watcher, event) = ready!(pulling.as_mut().poll(cx));
        self.pulling = event.is_ok().then(|| pull(watcher));
        Poll::Ready(Some(event))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::Limits;
    use crate::registry::{Door, Plan, Principal, Registry};
    use crate::tenant::Tenant;
    use domain_core::alloc::AllocRequest;
    use domain_core::aperture::ScrubWith;
    use domain_core::coherent::{Allocated, CoherentSpec};
    use domain_core::domain::{Close, Settings};
    use domain_core::layout::LayoutSpec;
    use domain_core::limits::{RESPONSE_BYTES, WATCH_CHANGES};
    use domain_core::session::{Role, SessionId};
    use domaind_proto::Message;
    use std::collections::BTreeMap;
    use tokio::time::{advance, timeout};

    const DRIVER: SessionId = SessionId::new(1);
    const OTHER: SessionId = SessionId::new(2);
    const PAGE: u64 = 4096;
    const PAGES: u64 = 4096;
    const OWNER: Principal = Principal {
        tenant: Tenant { uid: 7, pod: None },
        door: Door::Public,
    };

    /// A domain with a driver, and the daemon around it.
    struct Scene {
        registry: Registry,
        domain: Arc<Hosted>,
        stop: CancellationToken,
    }

    impl Scene {
        fn new() -> Scene {
            let registry = Registry::new(Limits::within(1 << 30, 2 << 30), ScrubWith::Zero);
            let layout = LayoutSpec {
                bounce_bytes: 0,
                coherent_bytes: PAGES * PAGE,
                ..LayoutSpec::default()
            };
            let plan = Plan {
                id: DomainId::new("d0").unwrap(),
                layout: layout.plan().unwrap(),
                settings: Settings::default(),
                direct_ranges: Vec::new(),
            };
            let domain = registry.create(OWNER.tenant, plan).unwrap();
            domain.core.join(DRIVER, Role::Driver).unwrap();
            Scene {
                registry,
                domain,
                stop: CancellationToken::new(),
            }
        }

        fn watch(&self, generation: Option<u64>) -> Watcher {
            let watching = self.registry.watchers.enter(OWNER).unwrap();
            Watcher::new(&self.domain, generation, watching, self.stop.clone())
        }

        fn alloc(&self) -> Allocated {
            let spec = CoherentSpec {
                place: AllocRequest {
                    len_bytes: PAGE,
                    align_bytes: 0,
                    limit: None,
                },
                persistent: false,
            };
            self.domain.core.alloc_coherent(DRIVER, &spec).unwrap()
        }

        fn alloc_all(&self, count: usize) -> Vec<Allocated> {
            (0..count).map(|_| self.alloc()).collect()
        }

        fn free(&self, there: &Allocated) {
            let iova = there.range.start();
            let freed = self.domain.core.free_coherent(DRIVER, iova, there.id);
            freed.map(drop).unwrap();
        }

        fn generation(&self) -> u64 {
            self.domain.core.usage().generation
        }

        /// What is visible, by address.
        fn visible(&self) -> BTreeMap<u64, v1::Mapping> {
            let (visible, _) = self.domain.core.visible(Iova::new(0), usize::MAX);
            let wire = visible.into_iter().map(v1::Mapping::from);
            wire.map(|mapping| (mapping.iova, mapping)).collect()
        }
    }

    async fn next(watcher: &mut Watcher) -> Event {
        let event = timeout(Duration::from_secs(5), watcher.next()).await;
        event.expect("there is an event").unwrap().event.unwrap()
    }

    /// Nothing comes, however long one waits.
    async fn is_silent(watcher: &mut Watcher) -> bool {
        timeout(Duration::from_secs(3600), watcher.next())
            .await
            .is_err()
    }

    /// What somebody knows who believes every event, and refuses what was not
    /// promised.
    #[derive(Default)]
    struct Believer {
        generation: Option<u64>,
        mappings: BTreeMap<u64, v1::Mapping>,
        /// More parts of a snapshot are to come.
        is_partial: bool,
        resyncs: usize,
        statuses: usize,
    }

    impl Believer {
        fn hear(&mut self, event: Event) {
            match event {
                Event::Snapshot(part) => self.see(part),
                Event::Change(change) => self.apply(change),
                Event::Status(_) => self.statuses += 1,
                Event::Resync(_) => {
                    self.resyncs += 1;
                    (self.generation, self.is_partial) = (None, false);
                    self.mappings.clear();
                }
            }
        }

        fn see(&mut self, part: v1::WatchSnapshot) {
            assert!(part.encoded_len() < RESPONSE_BYTES / 16);
            match self.generation {
                Some(generation) => {
                    assert!(self.is_partial, "a snapshot that nothing announced");
                    assert_eq!(part.generation, generation, "a part of another state");
                }
                None => self.generation = Some(part.generation),
            }
            for mapping in part.mappings {
                let last = self.mappings.last_key_value();
                assert!(last.is_none_or(|(last, _)| *last < mapping.iova));
                self.mappings.insert(mapping.iova, mapping);
            }
            self.is_partial = part.more;
        }

        fn apply(&mut self, change: v1::WatchChange) {
            let before = self.generation.expect("a change of something");
            assert_eq!(change.generation, before + 1, "a gap");
            self.generation = Some(change.generation);
            for range in change.removed {
                let removed = self.mappings.remove(&range.start);
                let removed = removed.expect("what is removed was there");
                assert_eq!(removed.iova + removed.len_bytes - 1, range.last);
            }
            for mapping in change.added {
                let there = self.mappings.insert(mapping.iova, mapping);
                assert_eq!(there, None, "what is added was not there");
            }
        }

        /// Hears until nothing more comes.
        async fn catch_up(&mut self, watcher: &mut Watcher) {
            while let Ok(event) = timeout(Duration::from_secs(1), watcher.next()).await {
                self.hear(event.unwrap().event.unwrap());
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_snapshot_a_status_and_then_every_change() {
        let scene = Scene::new();
        let first = scene.alloc();
        let mut watcher = scene.watch(None);
        let Event::Snapshot(part) = next(&mut watcher).await else {
            panic!("a snapshot comes first");
        };
        assert_eq!((part.mappings.len(), part.more), (1, false));
        assert_eq!(part.generation, scene.generation());
        let Event::Status(status) = next(&mut watcher).await else {
            panic!("a status comes behind");
        };
        assert_eq!(status.usage.unwrap().coherent_allocations, 1);
        assert_eq!(status.sessions, []);
        assert!(is_silent(&mut watcher).await);

        let second = scene.alloc();
        scene.free(&first);
        let Event::Change(added) = next(&mut watcher).await else {
            panic!("a change");
        };
        assert_eq!(added.generation, part.generation + 1);
        assert_eq!(added.added[0].mapping_id, second.id.get());
        assert_eq!(added.removed, []);
        let Event::Change(removed) = next(&mut watcher).await else {
            panic!("a change");
        };
        assert_eq!(removed.generation, part.generation + 2);
        assert_eq!(
            (removed.added, removed.removed),
            (vec![], vec![first.range.into()])
        );
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_is_woken() {
        let scene = Scene::new();
        let mut watcher = scene.watch(Some(scene.generation()));
        assert!(matches!(next(&mut watcher).await, Event::Status(_)));
        let waiting = tokio::spawn(async move { next(&mut watcher).await });
        tokio::task::yield_now().await;
        scene.alloc();
        assert!(matches!(waiting.await.unwrap(), Event::Change(_)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_large_snapshot_is_of_one_state_whatever_happens_between_its_parts() {
        for seed in 0..8_u64 {
            let scene = Scene::new();
            let mut there = scene.alloc_all(4 * PART);
            let mut watcher = scene.watch(None);
            let mut believer = Believer::default();
            let mut random = 0x9E37_79B9_7F4A_7C15_u64.wrapping_mul(seed + 1);
            let mut parts = 0;
            while parts == 0 || believer.is_partial {
                let event = next(&mut watcher).await;
                parts += usize::from(matches!(event, Event::Snapshot(_)));
                believer.hear(event);
                // xorshift
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let doomed = usize::try_from(random % (there.len() as u64)).unwrap();
                match random >> 60 {
                    0..4 => scene.free(&there.swap_remove(doomed)),
                    4..8 => there.push(scene.alloc()),
                    _ => {}
                }
            }
            assert!(parts >= 3, "seed {seed}: {parts} parts");
            believer.catch_up(&mut watcher).await;
            assert_eq!(believer.mappings, scene.visible(), "seed {seed}");
            assert_eq!(believer.generation, Some(scene.generation()));
            assert_eq!(believer.resyncs, 0, "seed {seed}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_watcher_that_falls_behind_hears_so_once_and_then_knows_all() {
        let scene = Scene::new();
        let kept = scene.alloc();
        let mut watcher = scene.watch(None);
        let mut believer = Believer::default();
        believer.catch_up(&mut watcher).await;
        for _ in 0..WATCH_CHANGES {
            scene.free(&scene.alloc());
        }
        let Event::Resync(resync) = next(&mut watcher).await else {
            panic!("it is behind");
        };
        assert_eq!(resync.generation, scene.generation());
        believer.hear(Event::Resync(resync));
        let event = next(&mut watcher).await;
        assert!(matches!(event, Event::Snapshot(_)));
        believer.hear(event);
        assert!(matches!(next(&mut watcher).await, Event::Status(_)));
        scene.free(&kept);
        believer.catch_up(&mut watcher).await;
        assert_eq!(believer.resyncs, 1);
        assert_eq!(believer.mappings, BTreeMap::new());
        assert_eq!(believer.generation, Some(scene.generation()));
    }

    #[tokio::test(start_paused = true)]
    async fn who_falls_behind_between_two_parts_starts_over() {
        let scene = Scene::new();
        scene.alloc_all(2 * PART);
        let mut watcher = scene.watch(None);
        let mut believer = Believer::default();
        believer.hear(next(&mut watcher).await);
        assert!(believer.is_partial);
        for _ in 0..WATCH_CHANGES {
            scene.free(&scene.alloc());
        }
        assert!(matches!(next(&mut watcher).await, Event::Resync(_)));
        believer = Believer::default();
        believer.catch_up(&mut watcher).await;
        assert_eq!(believer.mappings, scene.visible());
        assert_eq!(believer.resyncs, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn who_was_there_before_goes_on_where_it_was() {
        let scene = Scene::new();
        drop(scene.watch(None));
        let known = scene.generation();
        let first = scene.alloc();
        scene.alloc();
        let mut watcher = scene.watch(Some(known));
        let mut believer = Believer {
            generation: Some(known),
            ..Believer::default()
        };
        believer.hear(next(&mut watcher).await);
        assert_eq!(believer.mappings.len(), 1);
        scene.free(&first);
        believer.catch_up(&mut watcher).await;
        assert_eq!(believer.generation, Some(scene.generation()));
        assert_eq!(believer.mappings, scene.visible());
        assert_eq!((believer.resyncs, believer.statuses), (0, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn a_generation_that_is_not_known_is_answered_with_a_snapshot() {
        let scene = Scene::new();
        scene.alloc();
        for unknown in [0, scene.generation() + 1, u64::MAX] {
            let mut watcher = scene.watch(Some(unknown));
            let event = next(&mut watcher).await;
            assert!(matches!(event, Event::Resync(_)), "{unknown}: {event:?}");
            assert!(matches!(next(&mut watcher).await, Event::Snapshot(_)));
            assert!(matches!(next(&mut watcher).await, Event::Status(_)));
            assert!(is_silent(&mut watcher).await);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_status_comes_when_sessions_change_and_not_more_often_than_it_may() {
        let scene = Scene::new();
        let mut watcher = scene.watch(None);
        Believer::default().catch_up(&mut watcher).await;
        scene.domain.core.join(OTHER, Role::Device).unwrap();
        let Event::Status(status) = next(&mut watcher).await else {
            panic!("somebody has come");
        };
        assert_eq!(status.usage.unwrap().sessions, 2);
        scene.domain.core.leave(OTHER);
        let soon = STATUS_PAUSE - Duration::from_millis(1);
        assert!(timeout(soon, watcher.next()).await.is_err());
        let Event::Status(status) = next(&mut watcher).await else {
            panic!("somebody has gone");
        };
        assert_eq!(status.usage.unwrap().sessions, 1);
        // Mappings alone are no news of sessions.
        advance(STATUS_PAUSE).await;
        scene.alloc();
        assert!(matches!(next(&mut watcher).await, Event::Change(_)));
        assert!(is_silent(&mut watcher).await);
    }

    #[tokio::test(start_paused = true)]
    async fn changes_without_end_do_not_keep_a_status_back() {
        let scene = Scene::new();
        let mut watcher = scene.watch(None);
        Believer::default().catch_up(&mut watcher).await;
        advance(STATUS_PAUSE).await;
        scene.alloc_all(10);
        scene.domain.core.join(OTHER, Role::Device).unwrap();
        let mut believer = Believer {
            generation: Some(scene.generation() - 10),
            ..Believer::default()
        };
        for _ in 0..2 {
            believer.hear(next(&mut watcher).await);
        }
        assert_eq!(believer.statuses, 1);
    }

    #[tokio::test(start_paused = true)]
    async fn the_watch_ends_with_its_domain_whose_memory_it_does_not_keep() {
        let scene = Scene::new();
        let mut reading = scene.watch(None);
        let mut silent = scene.watch(None);
        Believer::default().catch_up(&mut reading).await;
        let _ = next(&mut silent).await;
        let Scene {
            registry, domain, ..
        } = scene;
        registry.delete(&domain, Close::Force).map(drop).unwrap();
        let memory = Arc::downgrade(&domain);
        drop(domain);
        assert!(memory.upgrade().is_none(), "a watcher keeps it");
        for mut watcher in [reading, silent] {
            let ended = watcher.next().await.unwrap_err();
            assert_eq!(ended.code(), Code::NotFound);
        }
        assert_eq!(registry.watchers.count(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_deleted_domain_is_gone_for_who_waits_whoever_still_has_it() {
        let scene = Scene::new();
        let mut watcher = scene.watch(None);
        Believer::default().catch_up(&mut watcher).await;
        let waiting = tokio::spawn(async move { watcher.next().await });
        tokio::task::yield_now().await;
        let deleted = scene.registry.delete(&scene.domain, Close::Force);
        deleted.map(drop).unwrap();
        assert_eq!(waiting.await.unwrap().unwrap_err().code(), Code::NotFound);
    }

    #[tokio::test(start_paused = true)]
    async fn the_stream_ends_behind_its_error_when_the_daemon_stops() {
        use tokio_stream::StreamExt;
        let scene = Scene::new();
        let mut events = scene.watch(None).events();
        assert!(events.next().await.unwrap().is_ok());
        scene.stop.cancel();
        let ended = events.next().await.unwrap().unwrap_err();
        assert_eq!(ended.code(), Code::Unavailable);
        assert!(events.next().await.is_none());
        assert_eq!(scene.registry.watchers.count(), 0);
    }
}
