//! From a connected fd socket to a session.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use domain_core::addr::{Granule, IovaRange};
use domain_core::iotlb::page::BYTES as SESSION_PAGE_BYTES;
use domain_core::iotlb::{SessionPage, Walker};
use domain_core::region::{Access, MapError, SharedMemory, SharedWords};
use domain_core::session::{Role, SessionId};
use domaind_proto::frame::{FrameError, FrameSocket};
use domaind_proto::names::{DomainId, parse_session};
use domaind_proto::v1::client_frame::Body as Ask;
use domaind_proto::v1::server_frame::Body as Answer;
use domaind_proto::{FD_PROTOCOL_MAX, FD_PROTOCOL_MIN, convert, v1};

use crate::apertures::{Aperture, Apertures, HUGE_PAGE_BYTES, RegionGrant};
use crate::client::AttachOptions;
use crate::error::{Ended, Error, ProtocolError};
use crate::live::Live;
use crate::token::Token;

/// How many regions a domain may have.
const REGIONS_MAX: u32 = 256;
/// How large a page table can be: its nodes have numbers of 18 bits.
const TABLE_BYTES_MOST: u64 = 1 << 30;
/// A page table is whole pages, whatever pages this host has.
const TABLE_PAGE_BYTES: u64 = 4096;
/// How long others wait for an Ack, where the daemon does not say it.
const ACK_TIMEOUT: Duration = Duration::from_secs(5);
/// Ids of the two requests of a handshake; later ones count on.
const HELLO_ID: u64 = 1;
const ATTACH_ID: u64 = 2;
/// The first id after the handshake.
pub(crate) const FIRST_FREE_ID: u64 = 3;

/// What this library calls itself in the daemon's logs.
const AGENT: &str = concat!(env!("CARGO_PKG_NAME"), "/", env!("CARGO_PKG_VERSION"));

/// What is known of a session from its beginning on.
#[derive(Debug)]
pub(crate) struct Facts {
    pub(crate) id: SessionId,
    pub(crate) domain: DomainId,
    pub(crate) role: Role,
    pub(crate) access: Access,
    pub(crate) access_enforced: bool,
    pub(crate) granule: Granule,
    pub(crate) generation: u64,
    /// A session that owes an Ack for so long is fenced.
    pub(crate) ack_timeout: Duration,
}

/// A session, and what it may reach.
#[derive(Debug)]
pub(crate) struct Attachment {
    pub(crate) facts: Facts,
    pub(crate) token: Token,
    pub(crate) live: Live,
}

/// Says hello, attaches, and maps what comes.
pub(crate) async fn attach(
    socket: &FrameSocket,
    domain: &DomainId,
    options: AttachOptions,
) -> Result<Attachment, Error> {
    hello(socket).await?;
    let attached = ask_to_attach(socket, domain, options).await?;
    let plan = Plan::read(&attached)?;
    let token = Token::new(&attached.token)?;
    let id = parse_session(&attached.session).map_err(ProtocolError::Name)?;
    let regions = receive_regions(socket, &plan, attached.regions).await?;
    let generation = receive_ready(socket).await?;
    let facts = Facts {
        id,
        domain: domain.clone(),
        role: options.role,
        access: options.access,
        access_enforced: attached.access_enforced,
        granule: plan.granule,
        generation,
        ack_timeout: match attached.ack_timeout_ms {
            0 => ACK_TIMEOUT,
            known => Duration::from_millis(known),
        },
    };
    regions.map(&plan, facts, token)
}

async fn hello(socket: &FrameSocket) -> Result<(), Error> {
    let hello = v1::Hello {
        min_version: FD_PROTOCOL_MIN,
        max_version: FD_PROTOCOL_MAX,
        agent: AGENT.to_owned(),
    };
    send(socket, HELLO_ID, Ask::Hello(hello)).await?;
    match receive_without_fd(socket).await? {
        Answer::Welcome(v1::Welcome { version, .. })
            if (FD_PROTOCOL_MIN..=FD_PROTOCOL_MAX).contains(&version) =>
        {
            Ok(())
        }
        Answer::Welcome(v1::Welcome { version, .. }) => {
            Err(ProtocolError::Version { version }.into())
        }
        other => Err(out_of_turn(&other, "Welcome").into()),
    }
}

async fn ask_to_attach(
    socket: &FrameSocket,
    domain: &DomainId,
    options: AttachOptions,
) -> Result<v1::Attached, Error> {
    let attach = v1::Attach {
        domain: domain.name(),
        role: v1::Role::from(options.role).into(),
        access: v1::Access::from(options.access).into(),
        ack_mode: v1::AckMode::Pins.into(),
        wants_removals: options.removals,
        wants_additions: options.additions,
    };
    send(socket, ATTACH_ID, Ask::Attach(attach)).await?;
    match receive_without_fd(socket).await? {
        Answer::Attached(attached) => Ok(attached),
        other => Err(out_of_turn(&other, "Attached").into()),
    }
}

async fn receive_regions(socket: &FrameSocket, plan: &Plan, count: u32) -> Result<Regions, Error> {
    if count > REGIONS_MAX {
        return Err(ProtocolError::TooManyRegions { regions: count }.into());
    }
    let mut regions = Regions::default();
    for _ in 0..count {
        match receive(socket).await? {
            (Answer::Region(region), fd) => regions.add(plan, region, fd)?,
            (other, _) => return Err(out_of_turn(&other, "Region").into()),
        }
    }
    Ok(regions)
}

async fn receive_ready(socket: &FrameSocket) -> Result<u64, Error> {
    match receive_without_fd(socket).await? {
        Answer::Ready(ready) => Ok(ready.generation),
        other => Err(out_of_turn(&other, "Ready").into()),
    }
}

/// An aperture's range, and its length, which it has.
#[derive(Clone, Copy)]
struct Place {
    range: IovaRange,
    len_bytes: u64,
}

/// Where the apertures lie, checked: both are made of whole granules.
struct Plan {
    granule: Granule,
    bounce: Option<Place>,
    coherent: Option<Place>,
}

impl Plan {
    fn read(attached: &v1::Attached) -> Result<Plan, ProtocolError> {
        let bytes = attached.granule_bytes;
        let granule = Granule::from_bytes(bytes).ok_or(ProtocolError::Granule { bytes })?;
        let place = |wire: Option<v1::IovaRange>| wire.map(|wire| place(wire, granule)).transpose();
        Ok(Plan {
            granule,
            bounce: place(attached.bounce)?,
            coherent: place(attached.coherent)?,
        })
    }
}

fn place(wire: v1::IovaRange, granule: Granule) -> Result<Place, ProtocolError> {
    let range = convert::range(wire).map_err(ProtocolError::Range)?;
    let is_whole = |bytes| granule.offset_in(bytes) == 0;
    match range.len_bytes() {
        Some(len_bytes) if is_whole(range.start().get()) && is_whole(len_bytes) => {
            Ok(Place { range, len_bytes })
        }
        _ => Err(ProtocolError::Aperture {
            range,
            granule_bytes: granule.bytes(),
        }),
    }
}

/// What came, before anything is mapped: how an aperture must be aligned is
/// known when all of its regions are.
#[derive(Default)]
struct Regions {
    bounce: Vec<RegionGrant>,
    coherent: Vec<RegionGrant>,
    table: Option<WordsGrant>,
    page: Option<WordsGrant>,
}

/// An array of words as it came from the daemon.
struct WordsGrant {
    size_bytes: u64,
    hugetlb: bool,
    fd: OwnedFd,
}

impl Regions {
    fn add(
        &mut self,
        plan: &Plan,
        region: v1::Region,
        fd: Option<OwnedFd>,
    ) -> Result<(), ProtocolError> {
        let fd = fd.ok_or(ProtocolError::MissingFd)?;
        match region.kind() {
            v1::RegionKind::Bounce => add_aperture(&mut self.bounce, plan.bounce, region, fd),
            v1::RegionKind::Coherent => add_aperture(&mut self.coherent, plan.coherent, region, fd),
            v1::RegionKind::Table => add_words(&mut self.table, region, fd),
            v1::RegionKind::SessionPage => add_words(&mut self.page, region, fd),
            v1::RegionKind::Unspecified => Err(ProtocolError::RegionKind { kind: region.kind }),
        }
    }

    fn map(self, plan: &Plan, facts: Facts, token: Token) -> Result<Attachment, Error> {
        let map = |place: Option<Place>, regions| {
            place
                .map(|place| Aperture::map(place.range, place.len_bytes, regions, facts.access))
                .transpose()
        };
        let apertures = Apertures {
            bounce: map(plan.bounce, self.bounce)?,
            coherent: map(plan.coherent, self.coherent)?,
        };
        let missing = |field| ProtocolError::Missing { field };
        let table = map_table(&self.table.ok_or(missing("page table"))?, plan)?;
        let page = map_session_page(&self.page.ok_or(missing("session page"))?)?;
        Ok(Attachment {
            live: Live::new(&facts, apertures, table, page),
            facts,
            token,
        })
    }
}

fn add_aperture(
    regions: &mut Vec<RegionGrant>,
    aperture: Option<Place>,
    region: v1::Region,
    fd: OwnedFd,
) -> Result<(), ProtocolError> {
    let aperture = aperture.ok_or(ProtocolError::RegionKind { kind: region.kind })?;
    let wire = region
        .range
        .ok_or(ProtocolError::Missing { field: "range" })?;
    let range = convert::range(wire).map_err(ProtocolError::Range)?;
    if !aperture.range.contains(range) {
        return Err(ProtocolError::RegionOutside {
            region: range,
            aperture: aperture.range,
        });
    }
    regions.push(RegionGrant {
        range,
        hugetlb: region.hugetlb,
        fd,
    });
    Ok(())
}

fn add_words(
    place: &mut Option<WordsGrant>,
    region: v1::Region,
    fd: OwnedFd,
) -> Result<(), ProtocolError> {
    let (kind, size_bytes) = (region.kind, region.size_bytes);
    if place.is_some() {
        return Err(ProtocolError::RegionTwice { kind });
    }
    let fits = match region.kind() {
        v1::RegionKind::SessionPage => size_bytes == SESSION_PAGE_BYTES,
        _ => (1..=TABLE_BYTES_MOST).contains(&size_bytes),
    };
    if !fits || !size_bytes.is_multiple_of(TABLE_PAGE_BYTES) {
        return Err(ProtocolError::RegionSize { kind, size_bytes });
    }
    *place = Some(WordsGrant {
        size_bytes,
        hugetlb: region.hugetlb,
        fd,
    });
    Ok(())
}

/// Most of a table has no pages: nothing is touched here but its header.
fn map_table(grant: &WordsGrant, plan: &Plan) -> Result<Walker<SharedWords>, Error> {
    let what = "page table";
    let words = map_words(grant, Access::ReadOnly);
    let words = words.map_err(|cause| Error::SharedWords { what, cause })?;
    let table = Walker::open(words).map_err(ProtocolError::Table)?;
    if table.granule() != plan.granule {
        let bytes = table.granule().bytes();
        return Err(ProtocolError::Granule { bytes }.into());
    }
    Ok(table)
}

/// Writable, whatever the session's access to the domain's memory.
fn map_session_page(grant: &WordsGrant) -> Result<SessionPage<SharedWords>, Error> {
    let what = "session page";
    let words = map_words(grant, Access::ReadWrite);
    let words = words.map_err(|cause| Error::SharedWords { what, cause })?;
    Ok(SessionPage::open(words).map_err(ProtocolError::SessionPage)?)
}

fn map_words(grant: &WordsGrant, access: Access) -> Result<SharedWords, MapError> {
    let align_bytes = match grant.hugetlb {
        true => HUGE_PAGE_BYTES,
        false => TABLE_PAGE_BYTES,
    };
    let mut memory = SharedMemory::reserve(grant.size_bytes, align_bytes)?;
    memory.map_at(0, grant.size_bytes, grant.fd.as_fd(), access)?;
    let words = memory.into_words(access);
    Ok(words.expect("all of it was mapped"))
}

async fn send(socket: &FrameSocket, request_id: u64, body: Ask) -> Result<(), Error> {
    let frame = v1::ClientFrame {
        request_id,
        body: Some(body),
    };
    match socket.send(&frame, None).await {
        // The daemon has closed, and may have said why: that is to be received.
        Ok(()) | Err(FrameError::Io(_)) => Ok(()),
        Err(error) => Err(Error::from_frame(error)),
    }
}

/// The next frame. Refusals and ends are errors.
async fn receive(socket: &FrameSocket) -> Result<(Answer, Option<OwnedFd>), Error> {
    let packet = socket
        .receive::<v1::ServerFrame>()
        .await
        .map_err(Error::from_frame)?
        .ok_or_else(|| Error::Ended(Ended::closed()))?;
    match packet.frame.body {
        Some(Answer::Refusal(refusal)) => Err(Error::Refused(refusal)),
        Some(Answer::SessionEnded(ended)) => Err(Error::Ended(ended.into())),
        Some(body) => Ok((body, packet.fd)),
        None => Err(ProtocolError::Missing { field: "body" }.into()),
    }
}

async fn receive_without_fd(socket: &FrameSocket) -> Result<Answer, Error> {
    match receive(socket).await? {
        (body, None) => Ok(body),
        (body, Some(_)) => Err(ProtocolError::UnwantedFd {
            frame: frame_name(&body),
        }
        .into()),
    }
}

pub(crate) fn out_of_turn(got: &Answer, wanted: &'static str) -> ProtocolError {
    ProtocolError::OutOfTurn {
        got: frame_name(got),
        wanted,
    }
}

pub(crate) fn frame_name(body: &Answer) -> &'static str {
    match body {
        Answer::Welcome(_) => "Welcome",
        Answer::Attached(_) => "Attached",
        Answer::Region(_) => "Region",
        Answer::Ready(_) => "Ready",
        Answer::MemoryRegistered(_) => "MemoryRegistered",
        Answer::MemoryUnregistered(_) => "MemoryUnregistered",
        Answer::Refusal(_) => "Refusal",
        Answer::SessionEnded(_) => "SessionEnded",
        Answer::Change(_) => "Change",
        Answer::MemoryOpened(_) => "MemoryOpened",
    }
}

#[cfg(test)]
mod tests {
    use domain_core::addr::Iova;
    use domain_core::region::MapError;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use tonic::Code;

    use super::*;
    use crate::error::EndReason;
    use crate::fake::{
        BOUNCE, COHERENT, FakeMemory, FakePeer, PAGE, TABLE_BYTES, attached, memfd, region,
        welcome, wire_range,
    };

    const BOUNCE_KIND: v1::RegionKind = v1::RegionKind::Bounce;
    const DRIVER: AttachOptions = AttachOptions {
        role: Role::Driver,
        access: Access::ReadWrite,
        removals: false,
        additions: false,
    };

    /// What becomes of a handshake in which the daemon says all this, and then
    /// closes.
    async fn outcome(said: Vec<(Answer, Option<OwnedFd>)>) -> Result<Attachment, Error> {
        let (client, daemon) = FakePeer::pair();
        for (request_id, (body, fd)) in (1..).zip(said) {
            daemon.say(request_id, body, fd.as_ref()).await;
        }
        daemon.fall_silent();
        let domain = DomainId::new("d").unwrap();
        attach(&client, &domain, DRIVER).await
    }

    /// A handshake that goes well up to the regions, which are these.
    async fn with_regions(regions: Vec<(Answer, Option<OwnedFd>)>) -> Error {
        let count = u32::try_from(regions.len()).unwrap();
        let mut said = vec![(welcome(1), None), (attached(count), None)];
        said.extend(regions);
        said.push((Answer::Ready(v1::Ready { generation: 1 }), None));
        outcome(said).await.unwrap_err()
    }

    /// A handshake in which the daemon answers Attach so.
    async fn with_attached(change: impl FnOnce(&mut v1::Attached)) -> Error {
        let Answer::Attached(mut answer) = attached(0) else {
            unreachable!("it is one")
        };
        change(&mut answer);
        let said = vec![(welcome(1), None), (Answer::Attached(answer), None)];
        outcome(said).await.unwrap_err()
    }

    #[tokio::test]
    async fn a_good_handshake_says_who_we_are_and_maps_the_memory() {
        let (client, daemon) = FakePeer::pair();
        daemon.welcome().await;
        let domain = DomainId::new("d").unwrap();
        let options = AttachOptions {
            additions: true,
            ..AttachOptions::new(Role::Device, Access::ReadOnly)
        };

        let attachment = attach(&client, &domain, options).await.unwrap();

        let hello = daemon.hear().await.unwrap();
        assert!(matches!(hello.body, Some(Ask::Hello(hello)) if hello.max_version == 1));
        let Some(Ask::Attach(asked)) = daemon.hear().await.unwrap().body else {
            panic!("Attach comes second")
        };
        assert_eq!(asked.domain, "domains/d");
        assert_eq!(asked.role(), v1::Role::Device);
        assert_eq!(asked.access(), v1::Access::ReadOnly);
        assert_eq!(asked.ack_mode(), v1::AckMode::Pins);
        assert!(asked.wants_additions && !asked.wants_removals);
        let Facts { id, generation, .. } = attachment.facts;
        assert_eq!((id, generation), (SessionId::new(9), 0));
        assert_eq!(attachment.live.table.granule(), Granule::Size4K);
        let mut bytes = [0xff; 2];
        let apertures = &attachment.live.apertures;
        apertures.read(Iova::new(COHERENT), &mut bytes).unwrap();
        assert_eq!(bytes, [0, 0]);
        assert!(apertures.write(Iova::new(COHERENT), &bytes).is_err());
    }

    #[tokio::test]
    async fn a_version_that_was_not_offered_is_refused() {
        for version in [0, 2] {
            let error = outcome(vec![(welcome(version), None)]).await.unwrap_err();
            assert!(
                matches!(error, Error::Protocol(ProtocolError::Version { version: v }) if v == version),
                "{error:?}"
            );
        }
    }

    #[tokio::test]
    async fn an_end_before_the_handshake_is_done_is_a_lost_connection() {
        let said = [vec![], vec![(welcome(1), None)]];
        for said in said {
            let error = outcome(said).await.unwrap_err();
            assert!(
                matches!(&error, Error::Ended(ended) if ended.reason == EndReason::ConnectionLost),
                "{error:?}"
            );
        }
    }

    #[tokio::test]
    async fn a_refusal_is_told_as_it_came() {
        let refusal = v1::Refusal::because(Code::NotFound, v1::ErrorReason::NoSuchDomain, "no d");
        let said = vec![(welcome(1), None), (Answer::Refusal(refusal), None)];

        let error = outcome(said).await.unwrap_err();

        assert_eq!(error.code(), Some(Code::NotFound));
        assert_eq!(error.reason(), v1::ErrorReason::NoSuchDomain);
    }

    #[tokio::test]
    async fn a_daemon_that_refuses_and_hangs_up_without_listening_is_understood() {
        let (client, daemon) = FakePeer::pair();
        let full = v1::Refusal::because(
            Code::ResourceExhausted,
            v1::ErrorReason::QuotaExceeded,
            "too many connections",
        );
        daemon.say(0, Answer::Refusal(full), None).await;
        drop(daemon);
        let domain = DomainId::new("d").unwrap();

        let shaken = attach(&client, &domain, DRIVER).await;

        let error = shaken.unwrap_err();
        assert_eq!(error.reason(), v1::ErrorReason::QuotaExceeded, "{error:?}");
    }

    #[tokio::test]
    async fn a_region_comes_with_its_fd_and_nothing_else_comes_with_one() {
        let missing = with_regions(vec![(region(BOUNCE_KIND, BOUNCE, 4), None)]).await;
        assert!(
            matches!(missing, Error::Protocol(ProtocolError::MissingFd)),
            "{missing:?}"
        );

        let surplus = outcome(vec![(welcome(1), Some(memfd(1)))])
            .await
            .unwrap_err();
        assert!(
            matches!(
                surplus,
                Error::Protocol(ProtocolError::UnwantedFd { frame: "Welcome" })
            ),
            "{surplus:?}"
        );
    }

    #[tokio::test]
    async fn a_region_outside_its_aperture_is_refused() {
        for (start, pages) in [(BOUNCE - PAGE, 2), (COHERENT, 1), (BOUNCE, 5), (0, 1)] {
            let error = with_regions(vec![(
                region(BOUNCE_KIND, start, pages),
                Some(memfd(pages)),
            )])
            .await;
            assert!(
                matches!(error, Error::Protocol(ProtocolError::RegionOutside { .. })),
                "{start:#x}: {error:?}"
            );
        }
    }

    #[tokio::test]
    async fn a_region_of_no_kind_or_without_a_range_is_refused() {
        let unknown = region(v1::RegionKind::Unspecified, BOUNCE, 1);
        let error = with_regions(vec![(unknown, Some(memfd(1)))]).await;
        assert!(
            matches!(
                error,
                Error::Protocol(ProtocolError::RegionKind { kind: 0 })
            ),
            "{error:?}"
        );

        let nowhere = v1::Region {
            size_bytes: 0,
            kind: BOUNCE_KIND.into(),
            range: None,
            hugetlb: false,
        };
        let error = with_regions(vec![(Answer::Region(nowhere), Some(memfd(1)))]).await;
        assert!(
            matches!(
                error,
                Error::Protocol(ProtocolError::Missing { field: "range" })
            ),
            "{error:?}"
        );
    }

    #[tokio::test]
    async fn regions_that_overlap_are_refused() {
        let first = (region(BOUNCE_KIND, BOUNCE, 3), Some(memfd(3)));
        let second = (region(BOUNCE_KIND, BOUNCE + 2 * PAGE, 2), Some(memfd(2)));

        let error = with_regions(vec![first, second]).await;

        let Error::Region { range, cause } = error else {
            panic!("{error:?}")
        };
        assert_eq!(range.start(), Iova::new(BOUNCE + 2 * PAGE));
        assert!(matches!(cause, MapError::Overlap { .. }), "{cause:?}");
    }

    #[tokio::test]
    async fn memory_that_is_too_small_or_could_shrink_is_refused() {
        let short = with_regions(vec![(region(BOUNCE_KIND, BOUNCE, 4), Some(memfd(3)))]).await;
        assert!(
            matches!(
                short,
                Error::Region {
                    cause: MapError::FileTooSmall { .. },
                    ..
                }
            ),
            "{short:?}"
        );

        let unsealed = memfd_create("unsealed", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&unsealed, 4 * PAGE).unwrap();
        let could_shrink =
            with_regions(vec![(region(BOUNCE_KIND, BOUNCE, 4), Some(unsealed))]).await;
        assert!(
            matches!(
                could_shrink,
                Error::Region {
                    cause: MapError::NotSealedAgainstShrinking { .. },
                    ..
                }
            ),
            "{could_shrink:?}"
        );
    }

    #[tokio::test]
    async fn as_many_regions_come_as_were_announced() {
        let regions = || (region(BOUNCE_KIND, BOUNCE, 1), Some(memfd(1)));
        let surplus = vec![(welcome(1), None), (attached(0), None), regions()];
        let missing = vec![
            (welcome(1), None),
            (attached(1), None),
            (Answer::Ready(v1::Ready { generation: 1 }), None),
        ];

        for said in [surplus, missing] {
            let error = outcome(said).await.unwrap_err();
            assert!(matches!(error, Error::Protocol(_)), "{error:?}");
        }

        let error = with_attached(|answer| answer.regions = u32::MAX).await;
        assert!(
            matches!(error, Error::Protocol(ProtocolError::TooManyRegions { .. })),
            "{error:?}"
        );
    }

    #[tokio::test]
    async fn a_plan_or_name_or_token_that_cannot_be_is_refused() {
        let whole = v1::IovaRange {
            start: 0,
            last: u64::MAX,
        };
        let ragged = v1::IovaRange {
            start: BOUNCE,
            last: BOUNCE + 1,
        };
        let backwards = v1::IovaRange {
            start: BOUNCE,
            last: 0,
        };
        for range in [whole, ragged, backwards, wire_range(BOUNCE + 1, 1)] {
            let error = with_attached(|answer| answer.bounce = Some(range)).await;
            assert!(matches!(error, Error::Protocol(_)), "{range:?}: {error:?}");
        }
        for error in [
            with_attached(|answer| answer.granule_bytes = 8192).await,
            with_attached(|answer| answer.token = vec![1; 65]).await,
            with_attached(|answer| answer.session = "9".to_owned()).await,
        ] {
            assert!(matches!(error, Error::Protocol(_)), "{error:?}");
        }
    }

    /// A handshake in which these are table and session page, and no other
    /// memory comes.
    async fn with_words(words: Vec<(Answer, OwnedFd)>) -> Result<Attachment, Error> {
        let count = u32::try_from(words.len()).unwrap();
        let mut said = vec![(welcome(1), None), (attached(count), None)];
        said.extend(words.into_iter().map(|(body, fd)| (body, Some(fd))));
        said.push((Answer::Ready(v1::Ready { generation: 1 }), None));
        outcome(said).await
    }

    fn resized((mut body, fd): (Answer, OwnedFd), size_bytes: u64) -> (Answer, OwnedFd) {
        let Answer::Region(region) = &mut body else {
            unreachable!("it is one")
        };
        region.size_bytes = size_bytes;
        (body, fd)
    }

    #[tokio::test]
    async fn a_session_has_one_table_and_one_session_page() {
        let memory = FakeMemory::new();
        let (table, page) = (|| memory.table_region(), || memory.page_region());
        assert!(with_words(vec![table(), page()]).await.is_ok());

        for words in [vec![], vec![table()], vec![page()]] {
            let error = with_words(words).await.unwrap_err();
            assert!(
                matches!(error, Error::Protocol(ProtocolError::Missing { .. })),
                "{error:?}"
            );
        }
        for words in [
            vec![table(), table(), page()],
            vec![table(), page(), page()],
        ] {
            let error = with_words(words).await.unwrap_err();
            assert!(
                matches!(error, Error::Protocol(ProtocolError::RegionTwice { .. })),
                "{error:?}"
            );
        }
    }

    #[tokio::test]
    async fn tables_and_session_pages_have_sizes_that_can_be() {
        let memory = FakeMemory::new();
        let (table, page) = (|| memory.table_region(), || memory.page_region());
        let table_of = |size| vec![resized(table(), size), page()];
        let page_of = |size| vec![table(), resized(page(), size)];
        let refused = [0, PAGE + 8, TABLE_BYTES_MOST + PAGE]
            .map(table_of)
            .into_iter()
            .chain([0, 4095, 2 * PAGE].map(page_of));
        for words in refused {
            let error = with_words(words).await.unwrap_err();
            assert!(
                matches!(error, Error::Protocol(ProtocolError::RegionSize { .. })),
                "{error:?}"
            );
        }
        // More than the file has.
        let beyond = with_words(table_of(2 * TABLE_BYTES)).await.unwrap_err();
        assert!(matches!(beyond, Error::SharedWords { .. }), "{beyond:?}");
    }

    #[tokio::test]
    async fn words_that_are_no_table_or_no_session_page_are_refused() {
        let memory = FakeMemory::new();
        let (table, page) = (|| memory.table_region(), || memory.page_region());
        let zeroes = || memfd(TABLE_BYTES / PAGE);

        let no_table = with_words(vec![(table().0, zeroes()), page()]).await;
        let no_page = with_words(vec![table(), (page().0, memfd(1))]).await;

        let (no_table, no_page) = (no_table.unwrap_err(), no_page.unwrap_err());
        assert!(
            matches!(no_table, Error::Protocol(ProtocolError::Table(_))),
            "{no_table:?}"
        );
        assert!(
            matches!(no_page, Error::Protocol(ProtocolError::SessionPage(_))),
            "{no_page:?}"
        );
        // A page that this session cannot write.
        let unwritable = with_words(vec![table(), (page().0, table().1)]).await;
        let unwritable = unwritable.unwrap_err();
        assert!(
            matches!(unwritable, Error::SharedWords { .. }),
            "{unwritable:?}"
        );
    }

    #[tokio::test]
    async fn the_ack_timeout_is_the_daemons_or_the_usual() {
        for (said, expected) in [(70, Duration::from_millis(70)), (0, ACK_TIMEOUT)] {
            let memory = FakeMemory::new();
            let Answer::Attached(mut answer) = attached(2) else {
                unreachable!("it is one")
            };
            answer.ack_timeout_ms = said;
            let mut frames = vec![(welcome(1), None), (Answer::Attached(answer), None)];
            for (body, fd) in [memory.table_region(), memory.page_region()] {
                frames.push((body, Some(fd)));
            }
            frames.push((Answer::Ready(v1::Ready { generation: 1 }), None));
            let attachment = outcome(frames).await.unwrap();
            assert_eq!(attachment.facts.ack_timeout, expected);
        }
    }
}
