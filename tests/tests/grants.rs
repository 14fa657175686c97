//! S-01 to S-08: what a client can do with the fds of a domain's regions.

use std::os::fd::AsRawFd;

use domaind_tests::actor::list;
use domaind_tests::grant::{Report, inspect};
use domaind_tests::users::{self, ALICE, BOB};
use domaind_tests::{Actor, Ask, Bytes, Code, Node, P, Raw, Reason, refused, v1};
use rustix::fs::{OFlags, SealFlags, SeekFrom};

/// The seals that every region has before anybody sees it.
const SEALS: SealFlags = SealFlags::SHRINK
    .union(SealFlags::GROW)
    .union(SealFlags::SEAL);

/// What holds for every region, whoever has it and with whatever access.
#[track_caller]
fn assert_protected(report: &Report, noexec: bool) {
    assert_eq!(report.permissions, 0o600, "{report:?}");
    assert_eq!(
        report.owner_uid,
        users::own_uid(),
        "the daemon's: {report:?}"
    );
    let seals = SealFlags::from_bits_retain(report.seals);
    assert!(seals.contains(SEALS), "{report:?}");
    if noexec {
        assert!(seals.contains(SealFlags::EXEC), "{report:?}");
        assert!(!report.becomes_executable, "{report:?}");
    }
    assert!(
        !report.shrinks && !report.grows && !report.seals_further,
        "{report:?}"
    );
    assert!(!report.opens_to_everybody, "{report:?}");
}

fn reports(value: &serde_json::Value) -> Vec<Report> {
    let reports = list(&value["regions"]).iter().cloned();
    reports
        .map(|one| serde_json::from_value(one).expect("a report"))
        .collect()
}

fn inspect_as(domain: &str, access: v1::Access) -> Ask {
    Ask::Inspect {
        domain: domain.to_owned(),
        role: v1::Role::Device,
        access,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn regions_are_sealed_private_and_never_executable() {
    let node = Node::start().await;
    let domain = node.domain("d0").await;
    let noexec = node.info().await.features.unwrap().memfd_noexec_seal;
    let driver = Raw::driver(&node, "d0").await;

    let regions = &driver.given.regions;
    assert_eq!(regions.len(), 2);
    let kinds: Vec<_> = regions.iter().map(|(region, _)| region.kind()).collect();
    assert_eq!(kinds, [v1::RegionKind::Bounce, v1::RegionKind::Coherent]);
    let ranges: Vec<_> = regions.iter().map(|(region, _)| region.range).collect();
    assert_eq!(ranges, [domain.bounce, domain.coherent]);
    for (region, fd) in regions {
        let report = inspect(fd);
        assert_protected(&report, noexec);
        let range = region.range.unwrap();
        assert_eq!(report.size_bytes, range.last - range.start + 1);
        assert!(report.writes && report.maps_writable && !report.opened_read_only);
        // All pages are there before anybody sees them.
        let stat = rustix::fs::fstat(fd).unwrap();
        let allocated = u64::try_from(stat.st_blocks).unwrap() * 512;
        // What inspect() punched may be gone.
        assert!(
            allocated >= report.size_bytes - P,
            "{allocated} of {report:?}"
        );
        let flags = rustix::io::fcntl_getfd(fd).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    }
}

/// S-08: every grant is a description of its own, and none is the daemon's:
/// what one holder does to flags and offset is seen by nobody else.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn each_grant_is_a_description_of_its_own() {
    let node = Node::start().await;
    node.domain("d0").await;
    let one = Raw::driver(&node, "d0").await;
    let two = Raw::driver(&node, "d0").await;
    const ODD: u64 = 12_345;
    for ((_, left), (_, right)) in one.given.regions.iter().zip(&two.given.regions) {
        rustix::fs::seek(left, SeekFrom::Start(ODD)).unwrap();
        rustix::fs::fcntl_setfl(left, OFlags::APPEND | OFlags::NONBLOCK).unwrap();
        assert_eq!(rustix::fs::tell(right).unwrap(), 0);
        let flags = rustix::fs::fcntl_getfl(right).unwrap();
        assert!(!flags.intersects(OFlags::APPEND | OFlags::NONBLOCK));
        assert_eq!(inode(left), inode(right), "the same memory");
    }
    // The daemon's own, as far as this user may look.
    let Ok(fds) = std::fs::read_dir(format!("/proc/{}/fdinfo", node.pid())) else {
        assert!(!users::is_root());
        return;
    };
    let mut seen = 0;
    for entry in fds.flatten() {
        let Ok(info) = std::fs::read_to_string(entry.path()) else {
            continue;
        };
        let field = |name: &str| {
            let line = info.lines().find(|line| line.starts_with(name))?;
            line.split_whitespace().nth(1)?.parse::<u64>().ok()
        };
        let region = one
            .given
            .regions
            .iter()
            .find(|(_, fd)| field("ino:") == Some(inode(fd)));
        if let Some((_, fd)) = region {
            seen += 1;
            assert_ne!(
                field("pos:"),
                Some(ODD),
                "fd {} is the daemon's {entry:?}",
                fd.as_raw_fd()
            );
        }
    }
    assert!(
        seen > 0 || !users::is_root(),
        "no fd of the daemon is a region's"
    );
}

fn inode(fd: &std::os::fd::OwnedFd) -> u64 {
    rustix::fs::fstat(fd).unwrap().st_ino
}

/// S-01, S-02. Of another user: read-only is read-only. Of the daemon's own:
/// refused, because it would not hold.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_read_only_grant_holds_or_is_refused() {
    let root = users::is_root();
    let node = if root {
        Node::shared(&[]).await
    } else {
        Node::start().await
    };
    node.domain("own").await;
    let before = node.usage("own").await;
    let refusal = refused(
        Raw::try_attach(&node, "own", v1::Role::Device, v1::Access::ReadOnly).await,
        Code::PermissionDenied,
        Reason::Unenforceable,
    );
    assert!(
        refusal.message.contains("advisory"),
        "it says what would allow it: {refusal:?}"
    );
    assert_eq!(node.usage("own").await, before);
    if !root {
        return;
    }
    let noexec = node.info().await.features.unwrap().memfd_noexec_seal;
    let mut alice = Actor::start_as(&node, ALICE);
    alice.create("alices");
    let given = alice.must(&inspect_as("alices", v1::Access::ReadOnly));
    assert_eq!(given["enforced"], true);
    let reports = reports(&given);
    assert_eq!(reports.len(), 2);
    for report in &reports {
        assert_protected(report, noexec);
        assert!(report.opened_read_only, "{report:?}");
        assert!(
            !report.writes && !report.maps_writable && !report.punches,
            "{report:?}"
        );
        assert!(
            !report.reopens_for_writing && !report.reopens_for_reading,
            "{report:?}"
        );
    }
    // Read-write, she may write, but not open it anew, nor change its rights.
    let given = alice.must(&inspect_as("alices", v1::Access::ReadWrite));
    for report in self::reports(&given) {
        assert_protected(&report, noexec);
        assert!(report.writes && !report.opened_read_only, "{report:?}");
        assert!(
            !report.reopens_for_writing && !report.reopens_for_reading,
            "{report:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_read_only_session_sees_everything_and_writes_nothing() {
    if !users::is_root() {
        // Only another user can have one; this one is told so.
        let node = Node::start().await;
        node.domain("d0").await;
        let refusal = Raw::try_attach(&node, "d0", v1::Role::Device, v1::Access::ReadOnly).await;
        refused(refusal, Code::PermissionDenied, Reason::Unenforceable);
        return;
    }
    let node = Node::shared(&[]).await;
    let (mut driver, mut reader) = (Actor::start_as(&node, ALICE), Actor::start_as(&node, ALICE));
    driver.create("d0");
    driver.attach("d0", v1::Role::Driver);
    let attached = reader.must(&Ask::Attach {
        domain: "d0".into(),
        role: v1::Role::Device,
        access: v1::Access::ReadOnly,
    });
    assert_eq!(attached["enforced"], true);
    let memory = driver.buffer(P);
    driver.fill(memory, 0, "to be read");
    let place = driver.map(memory, 0, 10, v1::Direction::ToDevice);
    reader.assert_sees(place.iova, "to be read");
    let said = reader.fails(&Ask::Write {
        iova: place.iova,
        bytes: Bytes::same(1, 1),
    });
    assert!(said.contains("read-only"), "{said}");
    let sessions = node.sessions("d0").await;
    let session = sessions
        .iter()
        .find(|s| s.access() == v1::Access::ReadOnly)
        .unwrap();
    assert!(session.access_enforced);
    assert_eq!(session.peer.as_ref().unwrap().uid, ALICE.uid);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_advisory_read_only_grant_says_that_it_is_not_enforced() {
    let node = Node::with(&["--policy-advisory-read-only"]).await;
    node.domain("d0").await;
    let access = v1::Access::ReadOnly;
    let raw = Raw::try_attach(&node, "d0", v1::Role::Device, access)
        .await
        .unwrap();
    assert!(!raw.given.attached.access_enforced);
    for (_, fd) in &raw.given.regions {
        let report = inspect(fd);
        assert!(report.opened_read_only && !report.writes && !report.maps_writable);
        // Just what is meant by advisory.
        assert!(report.reopens_for_writing);
    }
    let sessions = node.sessions("d0").await;
    assert_eq!(sessions.len(), 1);
    assert_eq!(
        (sessions[0].access(), sessions[0].access_enforced),
        (access, false)
    );
    let writer = Raw::device(&node, "d0").await;
    assert!(writer.given.attached.access_enforced);
}

/// Root may look everywhere, so this is about everybody else.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_daemon_cannot_be_looked_into_by_its_own_user() {
    let node = Node::start().await;
    node.domain("d0").await;
    let proc = format!("/proc/{}", node.pid());
    let owner =
        std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(format!("{proc}/fd")).unwrap());
    // A process that may not be dumped has its /proc files owned by root.
    assert_eq!(owner, 0);
    if users::is_root() {
        return;
    }
    for path in ["fd", "fdinfo", "map_files"] {
        assert!(
            std::fs::read_dir(format!("{proc}/{path}")).is_err(),
            "{path}"
        );
    }
    for path in ["mem", "maps", "environ"] {
        assert!(
            std::fs::File::open(format!("{proc}/{path}")).is_err(),
            "{path}"
        );
    }
}

/// S-03: nothing of another user's domain can be reached by a detour.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_stranger_cannot_open_the_regions_of_others_through_proc() {
    if !users::is_root() {
        let node = Node::start().await;
        node.domain("d0").await;
        let raw = Raw::device(&node, "d0").await;
        assert!(inspect(&raw.given.regions[0].1).permissions & 0o077 == 0);
        return;
    }
    let node = Node::shared(&[]).await;
    let (mut alice, mut bob) = (Actor::start_as(&node, ALICE), Actor::start_as(&node, BOB));
    alice.create("alices");
    bob.create("bobs");
    let hers = reports(&alice.must(&inspect_as("alices", v1::Access::ReadWrite)));
    let his = reports(&bob.must(&inspect_as("bobs", v1::Access::ReadWrite)));
    for report in hers.iter().chain(&his) {
        assert_eq!(report.permissions & 0o077, 0);
    }
    for report in &his {
        assert!(hers.iter().all(|other| other.inode != report.inode));
    }
    refused(
        bob.ask(&inspect_as("alices", v1::Access::ReadOnly)),
        Code::NotFound,
        Reason::NoSuchDomain,
    );
}
