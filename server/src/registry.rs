//! Domains and sessions by name, and who may see which.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use domain_core::Domain;
use domain_core::addr::IovaRange;
use domain_core::aperture::ScrubWith;
use domain_core::domain::{self, Close, InUse, Listener, Quarantined, Settings, Usage};
use domain_core::layout::{ApertureKind, Layout};
use domain_core::lease::LeaseTally;
use domain_core::limits::{DOMAINS, DOMAINS_PER_OWNER};
use domain_core::region::{Access, Backing, RegionError};
use domain_core::session::{Account, JoinError, Joining, Reader, Role, SessionId};
use domaind_proto::convert;
use domaind_proto::names::DomainId;
use domaind_proto::v1::{self, AckMode, EndReason, ErrorReason, Refusal};
use rustix::rand::{GetRandomFlags, getrandom};
use tokio_util::sync::CancellationToken;
use tonic::Code;

use crate::budget::{Budget, Limits, OverBudget, Pages, TableShare};
use crate::hosted::{Hosted, Parting, now_unix_ms};
use crate::live::{End, Live, Token, Wants};
use crate::peer::Peer;
use crate::pulse::Census;
use crate::reader::SessionReader;
use crate::replay::Users;
use crate::signal::Signal;
use crate::streams::{Pipelines, Watchers};
use crate::tenant::Tenant;
use crate::visitor::Visitor;

/// Through which door somebody came, which is part of who they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Door {
    /// The public sockets: sees what it owns and what a rule lets it near.
    Public,
    /// The operator's socket: sees everything.
    Admin,
}

/// Whose answers are kept and whose streams are counted. What somebody may is
/// said by a [`Visitor`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Principal {
    pub(crate) tenant: Tenant,
    pub(crate) door: Door,
}

/// All domains and sessions of one daemon.
#[derive(Debug)]
pub(crate) struct Registry {
    /// Names only. Held for look-ups and changes of the tables, never while a
    /// domain is made, copied or zeroed. May be held while a domain's own lock
    /// is taken, never the other way round.
    tables: RwLock<Tables>,
    budget: Budget,
    next_session: AtomicU64,
    /// What calls without a session were answered.
    pub(crate) users: Users,
    /// Who watches domains.
    pub(crate) watchers: Watchers,
    /// Which sessions have pipelines.
    pub(crate) pipelines: Pipelines,
    /// What every domain's memory is overwritten with.
    scrub_with: ScrubWith,
}

#[derive(Debug, Default)]
struct Tables {
    domains: BTreeMap<DomainId, Arc<Hosted>>,
    sessions: BTreeMap<SessionId, Arc<Live>>,
    /// Sessions that have ended and may still reach something.
    ghosts: BTreeMap<SessionId, Arc<Live>>,
}

/// What a new domain shall be, checked.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) id: DomainId,
    pub(crate) layout: Layout,
    pub(crate) settings: Settings,
    /// Where direct mappings may lie then.
    pub(crate) direct_ranges: Vec<IovaRange>,
}

impl Plan {
    /// # Errors
    /// A refusal of what cannot be a domain.
    pub(crate) fn new(id: DomainId, spec: &v1::DomainSpec) -> Result<Plan, Refusal> {
        let settings = convert::settings(spec)?;
        let layout = convert::layout_spec(spec)?.plan()?;
        Ok(Plan {
            id,
            direct_ranges: settings.restrictions.plan(&layout)?,
            layout,
            settings,
        })
    }

    fn pages(&self) -> Pages {
        match self.layout.backing() {
            Backing::Memfd => Pages::Ordinary,
            Backing::Hugetlb2M => Pages::Huge,
        }
    }
}

/// What somebody who attaches shall be, checked.
#[derive(Debug)]
pub(crate) struct Admission {
    pub(crate) domain: Arc<Hosted>,
    pub(crate) role: Role,
    pub(crate) access: Access,
    pub(crate) access_enforced: bool,
    pub(crate) peer: Arc<Peer>,
    pub(crate) ack_mode: AckMode,
    pub(crate) wants: Wants,
}

/// Why a domain was not made. Nothing is left behind.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CreateError {
    #[error("domain {id} exists")]
    Exists { id: DomainId },
    #[error("{used} domains are there, {whose} may have {limit}")]
    TooMany {
        whose: &'static str,
        limit: u32,
        used: usize,
    },
    #[error(transparent)]
    OverBudget(#[from] OverBudget),
    #[error(transparent)]
    Core(#[from] domain::CreateError),
    #[error("no randomness for the domain's uid")]
    Randomness(#[source] io::Error),
}

/// Why nobody was let in.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AdmitError {
    #[error(transparent)]
    Join(#[from] JoinError),
    #[error("no randomness for the session's token")]
    Randomness(#[source] io::Error),
    #[error("make the session page")]
    Page(#[source] RegionError),
}

/// A name that leads nowhere, or nowhere that the caller may see.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum Missing {
    #[error("there is no domain {0}")]
    Domain(DomainId),
    #[error("there is no session {0}")]
    Session(SessionId),
}

/// Counts over all domains.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Totals {
    pub(crate) domains: usize,
    pub(crate) sessions: usize,
    pub(crate) streaming: usize,
    pub(crate) coherent: usize,
    pub(crate) leases: LeaseTally,
    pub(crate) direct: usize,
    pub(crate) memories: usize,
    pub(crate) region_bytes: u64,
    pub(crate) region_budget_bytes: u64,
    pub(crate) invalidating: usize,
    pub(crate) quarantined: Quarantined,
    pub(crate) fenced: usize,
    pub(crate) watchers: usize,
}

/// Everything that there is, for whoever scrapes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Stock {
    pub(crate) totals: Totals,
    pub(crate) drivers: usize,
    pub(crate) devices: usize,
    /// Sessions that have ended and are not proven to be gone.
    pub(crate) ghosts: usize,
    /// Of the domains that are there, by kind.
    pub(crate) regions: [(&'static str, RegionTally); 3],
}

/// Regions of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct RegionTally {
    pub(crate) count: u64,
    pub(crate) bytes: u64,
}

impl RegionTally {
    fn plus(self, bytes: Option<u64>) -> RegionTally {
        bytes.map_or(self, |bytes| RegionTally {
            count: self.count + 1,
            bytes: self.bytes.saturating_add(bytes),
        })
    }
}

impl Registry {
    pub(crate) fn new(limits: Limits, scrub_with: ScrubWith) -> Registry {
        Registry {
            tables: RwLock::default(),
            budget: Budget::new(limits),
            next_session: AtomicU64::new(1),
            users: Users::default(),
            watchers: Watchers::default(),
            pipelines: Pipelines::default(),
            scrub_with,
        }
    }

    /// Makes a domain with all its memory. May take long: the kernel allocates
    /// and zeroes every page.
    pub(crate) fn create(&self, owner: Tenant, plan: Plan) -> Result<Arc<Hosted>, CreateError> {
        self.make(owner, plan, false)
    }

    /// The same for one that stands in the configuration file: it does not count
    /// among those that its owner may have.
    pub(crate) fn declare(&self, owner: Tenant, plan: Plan) -> Result<Arc<Hosted>, CreateError> {
        self.make(owner, plan, true)
    }

    fn make(&self, owner: Tenant, plan: Plan, declared: bool) -> Result<Arc<Hosted>, CreateError> {
        self.check_room(owner, &plan.id, declared)?;
        let share = self.budget.take(plan.layout.region_bytes(), plan.pages())?;
        let (id, scrub_with) = (plan.id.as_str(), self.scrub_with);
        let table = Arc::new(TableShare::new(&self.budget));
        let core = Domain::create_within(id, plan.layout, plan.settings, scrub_with, Some(table))?;
        let signal = Arc::new(Signal::new());
        core.listen(Arc::clone(&signal) as Arc<dyn Listener>);
        let hosted = Arc::new(Hosted {
            uid: random_hex().map_err(CreateError::Randomness)?,
            id: plan.id,
            owner,
            declared,
            create_time_unix_ms: now_unix_ms(),
            core,
            signal,
            parting: Parting::default(),
            deleted: CancellationToken::new(),
            share,
        });
        // Somebody else may have taken the name or the last place meanwhile.
        let mut tables = self.write();
        tables.check_room(owner, &hosted.id, declared)?;
        tables
            .domains
            .insert(hosted.id.clone(), Arc::clone(&hosted));
        Ok(hosted)
    }

    /// Would this domain find its place right now?
    pub(crate) fn check_create(&self, owner: Tenant, plan: &Plan) -> Result<(), CreateError> {
        self.check_room(owner, &plan.id, false)?;
        drop(self.budget.take(plan.layout.region_bytes(), plan.pages())?);
        Ok(())
    }

    /// Would this one find room if that one were gone?
    pub(crate) fn check_instead_of(&self, old: &Hosted, plan: &Plan) -> Result<(), CreateError> {
        let bytes = plan.layout.region_bytes();
        let budget = &self.budget;
        Ok(budget.check_instead_of(&old.share, bytes, plan.pages())?)
    }

    /// From now on these bounds for regions; what is there stays.
    pub(crate) fn set_limits(&self, limits: Limits) {
        self.budget.set_limits(limits);
    }

    fn check_room(&self, owner: Tenant, id: &DomainId, declared: bool) -> Result<(), CreateError> {
        self.read().check_room(owner, id, declared)
    }

    /// All domains that stand in the configuration file, or did.
    pub(crate) fn declared(&self) -> Vec<Arc<Hosted>> {
        let tables = self.read();
        let domains = tables.domains.values();
        domains.filter(|domain| domain.declared).cloned().collect()
    }

    /// All sessions that have not ended.
    pub(crate) fn all_attached(&self) -> Vec<Arc<Live>> {
        self.read().sessions.values().cloned().collect()
    }

    /// The domain of a name, whoever asks.
    pub(crate) fn find(&self, id: &DomainId) -> Option<Arc<Hosted>> {
        self.read().domains.get(id).cloned()
    }

    /// Domains that the caller may see, by name, behind `after`.
    pub(crate) fn domains(
        &self,
        who: &Visitor,
        after: Option<&DomainId>,
        max: usize,
    ) -> Vec<Arc<Hosted>> {
        let tables = self.read();
        let behind = tables
            .domains
            .values()
            .filter(|domain| after.is_none_or(|after| domain.id > *after));
        behind
            .filter(|domain| who.may_see(domain))
            .take(max)
            .cloned()
            .collect()
    }

    /// Takes a domain out of the tables and ends its sessions. Answers which.
    pub(crate) fn delete(&self, domain: &Arc<Hosted>, how: Close) -> Result<Vec<SessionId>, InUse> {
        let sessions = domain.core.close(how)?;
        let ending: Vec<_> = {
            let mut tables = self.write();
            // Another delete may have been faster, and a namesake may be there.
            if tables
                .domains
                .get(&domain.id)
                .is_some_and(|there| Arc::ptr_eq(there, domain))
            {
                tables.domains.remove(&domain.id);
            }
            domain.deleted.cancel();
            let ending = sessions.iter().filter_map(|id| tables.haunt(*id));
            ending.collect()
        };
        for session in &ending {
            session.end.call(EndReason::DomainDeleted);
            session.domain.core.fence(session.id);
        }
        Ok(sessions)
    }

    /// Lets somebody into a domain; answers the session and the generation
    /// that it starts from.
    pub(crate) fn admit(&self, admission: Admission) -> Result<(Arc<Live>, u64), AdmitError> {
        let id = SessionId::new(self.next_session.fetch_add(1, Ordering::Relaxed));
        let Admission {
            domain,
            role,
            access,
            access_enforced,
            peer,
            ack_mode,
            wants,
        } = admission;
        let reader = SessionReader::new(id, ack_mode).map_err(AdmitError::Page)?;
        let reader = Arc::new(reader);
        let joining = Joining {
            role,
            account: Account(peer.uid()),
            reader: Some(Arc::clone(&reader) as Arc<dyn Reader>),
        };
        let reads_the_log = reader.by_frames() || wants.any();
        let live = Arc::new(Live {
            reader,
            wants,
            id,
            token: Token::new(id).map_err(AdmitError::Randomness)?,
            domain,
            role,
            access,
            access_enforced,
            peer,
            attach_time_unix_ms: now_unix_ms(),
            end: End::default(),
            answers: Arc::default(),
        });
        // Under the tables' lock, so that a delete sees the session in both
        // places or in none.
        let mut tables = self.write();
        if reads_the_log {
            live.domain.core.watch();
        }
        let generation = live.domain.core.join(id, joining)?;
        tables.sessions.insert(id, Arc::clone(&live));
        Ok((live, generation))
    }

    /// Ends a session: all that it held is released, zeroed first. What it may
    /// still reach waits until it is [forgotten](Registry::forget).
    pub(crate) fn end(&self, session: &Live, reason: EndReason) {
        if self.write().haunt(session.id).is_some() {
            session.domain.parting.begin(session.id);
        }
        session.end.call(reason);
        session.domain.core.fence(session.id);
    }

    /// Nobody looks any more whether a session that has ended is gone at once.
    pub(crate) fn parted(&self, session: &Live) {
        session.domain.parting.end(session.id);
        session.domain.signal.changed();
    }

    /// A session, attached or ended, holds nothing any more.
    pub(crate) fn forget(&self, session: &Live) {
        {
            let mut tables = self.write();
            tables.sessions.remove(&session.id);
            tables.ghosts.remove(&session.id);
        }
        session.end.call(EndReason::Unspecified);
        session.domain.core.leave(session.id);
    }

    /// Ends all sessions, telling each of them.
    pub(crate) fn end_all(&self, reason: EndReason) {
        for session in self.all_attached() {
            session.end.call(reason);
        }
    }

    /// A session that has not ended, whoever asks.
    pub(crate) fn attached(&self, id: SessionId) -> Option<Arc<Live>> {
        self.read().sessions.get(&id).cloned()
    }

    /// A session, attached or ended, that may reach something, whoever asks.
    pub(crate) fn session(&self, id: SessionId) -> Option<Arc<Live>> {
        let tables = self.read();
        let attached = tables.sessions.get(&id);
        attached.or_else(|| tables.ghosts.get(&id)).cloned()
    }

    /// Sessions that the caller may see, by number, behind `after`; only those
    /// of `domain` if one is named.
    pub(crate) fn sessions(
        &self,
        who: &Visitor,
        domain: Option<&Arc<Hosted>>,
        after: Option<SessionId>,
        max: usize,
    ) -> Vec<Arc<Live>> {
        let tables = self.read();
        let behind = |session: &&Arc<Live>| after.is_none_or(|after| session.id > after);
        let wanted = |session: &&Arc<Live>| {
            domain.is_none_or(|domain| Arc::ptr_eq(domain, &session.domain))
                && who.may_see(&session.domain)
        };
        let page = |sessions: &BTreeMap<_, Arc<Live>>| {
            let sessions = sessions.values().filter(behind).filter(wanted);
            sessions.take(max).cloned().collect::<Vec<_>>()
        };
        let mut sessions = page(&tables.sessions);
        sessions.extend(page(&tables.ghosts));
        sessions.sort_by_key(|session| session.id);
        sessions.truncate(max);
        sessions
    }

    /// The session that a token and a peer belong to.
    pub(crate) fn authenticate(&self, token: &Token, peer: &Peer) -> Result<Arc<Live>, Refusal> {
        let found = self.read().sessions.get(&token.session()).cloned();
        let live = found
            .filter(|live| live.token.matches(token))
            .ok_or_else(|| {
                Refusal::because(
                    Code::NotFound,
                    ErrorReason::NoSuchSession,
                    "no session is live with this token",
                )
            })?;
        if !live.peer.is_same_process(peer) || peer.is_dead() {
            let message = format!("the session belongs to {}, this is {peer}", live.peer);
            return Err(Refusal::because(
                Code::PermissionDenied,
                ErrorReason::WrongPeer,
                message,
            ));
        }
        Ok(live)
    }

    /// How much there is, by the tables alone.
    pub(crate) fn census(&self) -> Census {
        let tables = self.read();
        Census {
            domains: tables.domains.len(),
            sessions: tables.sessions.len(),
        }
    }

    pub(crate) fn stock(&self) -> Stock {
        let (domains, drivers, devices, ghosts) = {
            let tables = self.read();
            let of = |role| {
                tables
                    .sessions
                    .values()
                    .filter(move |live| live.role == role)
            };
            (
                tables.domains.values().cloned().collect::<Vec<_>>(),
                of(Role::Driver).count(),
                of(Role::Device).count(),
                tables.ghosts.len(),
            )
        };
        let regions = |bytes: &dyn Fn(&Domain) -> Option<u64>| {
            let cores = domains.iter().map(|domain| bytes(&domain.core));
            cores.fold(RegionTally::default(), RegionTally::plus)
        };
        let aperture = |kind| {
            move |core: &Domain| {
                core.aperture(kind)
                    .and_then(|found| found.range().len_bytes())
            }
        };
        Stock {
            drivers,
            devices,
            ghosts,
            regions: [
                ("bounce", regions(&aperture(ApertureKind::Bounce))),
                ("coherent", regions(&aperture(ApertureKind::Coherent))),
                ("table", regions(&|core| Some(core.usage().table_bytes))),
            ],
            totals: self.totals(),
        }
    }

    pub(crate) fn totals(&self) -> Totals {
        let (domains, sessions): (Vec<_>, usize) = {
            let tables = self.read();
            (
                tables.domains.values().cloned().collect(),
                tables.sessions.len(),
            )
        };
        let count = |totals: Totals, usage: Usage| Totals {
            streaming: totals.streaming + usage.streaming,
            coherent: totals.coherent + usage.coherent,
            leases: LeaseTally {
                count: totals.leases.count + usage.leases.count,
                bytes: totals.leases.bytes.saturating_add(usage.leases.bytes),
            },
            direct: totals.direct + usage.direct,
            memories: totals.memories + usage.memories,
            invalidating: totals.invalidating + usage.invalidating,
            quarantined: Quarantined {
                mappings: totals.quarantined.mappings + usage.quarantined.mappings,
                bytes: totals
                    .quarantined
                    .bytes
                    .saturating_add(usage.quarantined.bytes),
            },
            fenced: totals.fenced + usage.fenced,
            ..totals
        };
        let start = Totals {
            domains: domains.len(),
            sessions,
            region_bytes: self.budget.used_bytes(),
            region_budget_bytes: self.budget.limit_bytes(),
            watchers: self.watchers.count(),
            ..Totals::default()
        };
        domains
            .iter()
            .map(|domain| domain.core.usage())
            .fold(start, count)
    }

    // A panic while the tables are locked leaves them whole: every change is
    // one insert or one remove.
    fn read(&self) -> RwLockReadGuard<'_, Tables> {
        self.tables.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Tables> {
        self.tables.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tables {
    /// A session has ended, and may still reach something.
    fn haunt(&mut self, id: SessionId) -> Option<Arc<Live>> {
        let live = self.sessions.remove(&id)?;
        self.ghosts.insert(id, Arc::clone(&live));
        Some(live)
    }

    fn check_room(&self, owner: Tenant, id: &DomainId, declared: bool) -> Result<(), CreateError> {
        if self.domains.contains_key(id) {
            return Err(CreateError::Exists { id: id.clone() });
        }
        let owned = self
            .domains
            .values()
            .filter(|domain| !declared && !domain.declared && domain.owner == owner)
            .count();
        let checks = [
            ("a user", DOMAINS_PER_OWNER, owned),
            ("a node", DOMAINS, self.domains.len()),
        ];
        match checks
            .into_iter()
            .find(|(_, limit, used)| *used >= *limit as usize)
        {
            Some((whose, limit, used)) => Err(CreateError::TooMany { whose, limit, used }),
            None => Ok(()),
        }
    }
}

impl From<CreateError> for Refusal {
    fn from(error: CreateError) -> Refusal {
        match error {
            CreateError::Exists { ref id } => {
                Refusal::of(Code::AlreadyExists, ErrorReason::DomainExists, &error)
                    .with("domain", id)
            }
            CreateError::TooMany { limit, used, .. } => {
                Refusal::of(Code::ResourceExhausted, ErrorReason::QuotaExceeded, &error)
                    .with("quota", "domains")
                    .with("limit", limit)
                    .with("used", used)
            }
            CreateError::OverBudget(over) => {
                Refusal::of(Code::ResourceExhausted, ErrorReason::NoMemory, &error)
                    .with("want_bytes", over.want_bytes)
                    .with("used", over.used_bytes)
                    .with("limit", over.limit_bytes)
            }
            CreateError::Core(core) => core.into(),
            CreateError::Randomness(_) => Refusal::of(Code::Internal, ErrorReason::Bug, &error),
        }
    }
}

impl From<AdmitError> for Refusal {
    fn from(error: AdmitError) -> Refusal {
        match error {
            AdmitError::Join(join) => join.into(),
            AdmitError::Randomness(_) => Refusal::of(Code::Internal, ErrorReason::Bug, &error),
            AdmitError::Page(_) => {
                Refusal::of(Code::ResourceExhausted, ErrorReason::NoMemory, &error)
            }
        }
    }
}

impl From<Missing> for Refusal {
    fn from(missing: Missing) -> Refusal {
        let not_found = |reason| Refusal::of(Code::NotFound, reason, &missing);
        match &missing {
            Missing::Domain(id) => not_found(ErrorReason::NoSuchDomain).with("domain", id),
            Missing::Session(id) => not_found(ErrorReason::NoSuchSession).with("session", id),
        }
    }
}

fn random_hex() -> io::Result<String> {
    let mut bytes = [0u8; 16];
    getrandom(&mut bytes, GetRandomFlags::empty())?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
