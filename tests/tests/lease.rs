//! Leases between real processes: a driver has a part of the bounce aperture to
//! itself, until it gives it back, ends, or a reset takes it away.

use domaind_tests::frames::Acker;
use domaind_tests::node::{name, scrubbed, spec};
use domaind_tests::refusal::assert_numbers;
use domaind_tests::v1::{self, MappingKind};
use domaind_tests::{Actor, Caller, Code, Ctl, Node, P, Raw, Reason, files, refused};

async fn with_d0(pages: u64) -> Node {
    let node = Node::start().await;
    node.create("d0", spec(pages * P, 4 * P)).await.unwrap();
    node
}

/// Word 3 of the session page, as the session itself reads it.
fn revocations(session: &Raw) -> u64 {
    let is_page = |region: &v1::Region| region.kind() == v1::RegionKind::SessionPage;
    let pages = &session.given.tables;
    let (_, fd) = pages.iter().find(|(region, _)| is_page(region)).unwrap();
    u64::from_ne_bytes(files::peek(fd, 3 * 8, 8).try_into().unwrap())
}

/// Waits until its leases are asked for, and says that it uses them no more. Answers how often its page says by then that
/// some were taken away.
async fn say_gone(owner: &mut Acker) -> u64 {
    let asked = owner.asked().await;
    let revoked = revocations(&owner.raw);
    owner.ack(asked.generation).await;
    revoked
}

async fn session_of(node: &Node, session: &Raw) -> v1::Session {
    let sessions = node.sessions("d0").await;
    let mut sessions = sessions.into_iter();
    sessions.find(|one| one.name == session.name()).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_lease_is_zeroed_shown_counted_and_gone_when_it_is_released() {
    let node = with_d0(16).await;
    let driver = Raw::driver(&node, "d0").await;
    let device = Raw::device(&node, "d0").await;
    let before = node.usage("d0").await;

    let lease = driver.lease_len(P + 1).await.unwrap();

    assert_eq!((lease.iova % P, lease.len_bytes), (0, 2 * P));
    let bytes = usize::try_from(lease.len_bytes).unwrap();
    assert_eq!(driver.read(lease.iova, bytes), vec![0; bytes]);
    driver.write(lease.iova + P, b"a slot of the driver's");
    assert_eq!(device.read(lease.iova + P, 22), b"a slot of the driver's");
    let listed = node.mappings("d0").await;
    assert_eq!(listed.len(), 1);
    let shown = &listed[0];
    assert_eq!(shown.kind(), MappingKind::Lease);
    assert_eq!((shown.iova, shown.len_bytes), (lease.iova, lease.len_bytes));
    assert_eq!(shown.mapping_id, lease.mapping_id);
    assert_eq!(
        (shown.perm(), shown.persistent),
        (v1::Perm::ReadWrite, false)
    );
    assert_eq!(shown.session, driver.name());
    let usage = node.usage("d0").await;
    assert_eq!((usage.leases, usage.lease_bytes), (1, 2 * P));
    assert_eq!(
        (usage.streaming_mappings, usage.bounce_used_bytes),
        (0, 2 * P)
    );
    let (owner, other) = (
        session_of(&node, &driver).await,
        session_of(&node, &device).await,
    );
    assert_eq!((owner.leases, owner.lease_bytes), (1, 2 * P));
    assert_eq!((other.leases, other.lease_bytes), (0, 0));
    let info = node.info().await;
    assert_eq!((info.leases, info.lease_bytes), (1, 2 * P));
    let last = lease.iova + lease.len_bytes - 1;
    let pieces = Caller::session(&device)
        .translate(lease.iova, last, v1::Perm::ReadWrite)
        .await
        .unwrap();
    assert_eq!((pieces.len(), pieces[0].kind()), (1, MappingKind::Lease));

    driver.release(lease.iova, lease.mapping_id).await.unwrap();

    assert_eq!(node.usage("d0").await, before_with(&node, before).await);
    assert_eq!(revocations(&driver), 0, "it gave it back itself");
    assert_eq!(device.read(lease.iova, bytes), vec![scrubbed(); bytes]);
    let again = driver.release(lease.iova, lease.mapping_id).await;
    refused(again, Code::NotFound, Reason::NoSuchMapping);
}

/// What was used before, but for the page table, which never shrinks.
async fn before_with(node: &Node, before: v1::DomainUsage) -> v1::DomainUsage {
    v1::DomainUsage {
        table_bytes: node.usage("d0").await.table_bytes,
        ..before
    }
}

/// D3 and D8.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_mib_is_255_leases_and_what_is_wrong_is_refused_with_its_reason() {
    let node = with_d0(256).await;
    let (driver, other) = (
        Raw::driver(&node, "d0").await,
        Raw::driver(&node, "d0").await,
    );
    let mut leases = Vec::new();
    for _ in 0..255 {
        leases.push(driver.lease_len(P).await.unwrap());
    }
    let full = || async {
        let refusal = refused(
            other.lease_len(P).await,
            Code::ResourceExhausted,
            Reason::NoSpace,
        );
        assert_numbers(&refusal, &[("largest_hole_bytes", "0")]);
    };
    full().await;
    let stale = leases[9];
    refused(
        other.release(stale.iova, stale.mapping_id).await,
        Code::PermissionDenied,
        Reason::NotYours,
    );
    driver.release(stale.iova, stale.mapping_id).await.unwrap();
    let again = other.lease_len(P).await.unwrap();
    assert_eq!(again.iova, stale.iova);
    full().await;
    for (iova, id) in [
        (stale.iova, stale.mapping_id),
        (again.iova + 1, again.mapping_id),
        (again.iova, again.mapping_id + 1),
    ] {
        let missing = other.release(iova, id).await;
        refused(missing, Code::NotFound, Reason::NoSuchMapping);
    }
    // Nothing else ends it.
    let freed = other.free(again.iova, again.mapping_id).await;
    refused(freed, Code::NotFound, Reason::NoSuchMapping);
    let device = Raw::device(&node, "d0").await;
    let denied = device.lease_len(P).await;
    refused(denied, Code::PermissionDenied, Reason::WrongRole);
    let nothing = driver.lease_len(0).await;
    refused(nothing, Code::InvalidArgument, Reason::ZeroLength);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_bytes_and_the_number_of_a_sessions_leases_are_bounded() {
    let node = with_d0(64).await;
    let bound = |leases, lease_bytes| v1::UpdateDomainRequest {
        name: name("d0"),
        quotas: Some(v1::Quotas {
            leases,
            lease_bytes,
            ..Default::default()
        }),
        ..Default::default()
    };
    node.update(bound(2, 3 * P)).await.unwrap();
    let driver = Raw::driver(&node, "d0").await;
    driver.lease_len(2 * P).await.unwrap();
    let exhausted = |answer| refused(answer, Code::ResourceExhausted, Reason::QuotaExceeded);
    let bytes = exhausted(driver.lease_len(P + 1).await);
    assert_eq!(bytes.metadata["quota"], "lease_bytes");
    let numbers = [("limit", "12288"), ("used", "8192"), ("want", "8192")];
    assert_numbers(&bytes, &numbers);
    driver.lease_len(P).await.unwrap();
    let number = exhausted(driver.lease_len(1).await);
    assert_numbers(
        &number,
        &[("quota", "leases"), ("limit", "2"), ("used", "2")],
    );
    for below in [bound(1, 0), bound(0, 3 * P - 1)] {
        let (code, reason) = (Code::FailedPrecondition, Reason::QuotaExceeded);
        refused(node.update(below).await, code, reason);
    }
}

/// D15.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_killed_driver_leaves_its_lease_free_and_zero_for_the_next() {
    let node = with_d0(16).await;
    let usage = node.usage("d0").await;
    let mut driver = Actor::driver(&node, "d0");
    let place = driver.lease(15 * P);
    driver.write(place.iova, "what only the dead knew");
    driver.assert_sees(place.iova, "what only the dead knew");

    driver.kill();

    let wanted = before_with(&node, usage).await;
    node.until_usage("d0", wanted).await;
    let heir = Raw::driver(&node, "d0").await;
    let lease = heir.lease_len(15 * P).await.unwrap();
    assert_eq!(lease.iova, place.iova);
    let seen = heir.read(lease.iova, 15 * 4_096);
    assert!(seen.iter().all(|byte| *byte == 0));
}

/// D11.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_reset_needs_force_and_tells_the_owners_in_their_session_pages() {
    let node = with_d0(16).await;
    let mut owner = Acker {
        raw: Raw::driver(&node, "d0").await,
    };
    let other = Raw::driver(&node, "d0").await;
    let lease = owner.raw.lease_len(2 * P).await.unwrap();
    owner.raw.write(lease.iova, b"lost");
    let reset = |force| {
        let request = v1::ResetBounceRequest {
            force,
            ..Default::default()
        };
        let (request, mut calls) = (other.signed(request), other.calls.clone());
        async move { domaind_tests::refusal::answer(calls.reset_bounce(request).await) }
    };
    let in_use = refused(
        reset(false).await,
        Code::FailedPrecondition,
        Reason::BounceInUse,
    );
    assert_numbers(&in_use, &[("streaming_mappings", "0"), ("leases", "1")]);
    assert_eq!(revocations(&owner.raw), 0);

    // It pins nothing, and is asked all the same: of pins for leases only itself can know.
    let (ended, revoked) = tokio::join!(reset(true), say_gone(&mut owner));
    let ended = ended.unwrap();
    assert_eq!((revoked, revocations(&other)), (1, 0));

    assert_eq!((ended.ended_mappings, ended.ended_leases), (0, 1));
    assert_eq!(owner.raw.read(lease.iova, 4), vec![scrubbed(); 4]);
    let gone = owner.raw.release(lease.iova, lease.mapping_id).await;
    refused(gone, Code::NotFound, Reason::NoSuchMapping);
    // Nothing is taken away the second time.
    assert_eq!(reset(false).await.unwrap().ended_leases, 0);
    assert_eq!(revocations(&owner.raw), 1);
}

/// P-04.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_repeated_lease_or_release_has_one_effect_and_one_answer() {
    let node = with_d0(16).await;
    let driver = Raw::driver(&node, "d0").await;
    let lease = |len_bytes| {
        driver.lease(v1::LeaseRequest {
            len_bytes,
            request_id: "lease".to_owned(),
            ..Default::default()
        })
    };
    let first = lease(P).await.unwrap();
    assert_eq!(lease(P).await, Ok(first));
    assert_eq!(node.usage("d0").await.leases, 1);
    refused(lease(2 * P).await, Code::InvalidArgument, Reason::RequestId);

    let release = || async {
        let request = driver.signed(v1::ReleaseRequest {
            iova: first.iova,
            mapping_id: first.mapping_id,
            request_id: "release".to_owned(),
        });
        domaind_tests::refusal::answer(driver.calls.clone().release(request).await)
    };
    let released = release().await.unwrap();
    assert_eq!(release().await, Ok(released));
    assert_eq!(node.usage("d0").await.leases, 0);
    assert_eq!(lease(P).await, Ok(first), "though it has ended");
    assert_eq!(node.usage("d0").await.leases, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn domainctl_lists_leases_and_says_why_a_domain_is_in_use() {
    let node = with_d0(16).await;
    let ctl = Ctl::new(&node);
    let (driver, other) = (
        Raw::driver(&node, "d0").await,
        Raw::driver(&node, "d0").await,
    );
    let lease = driver.lease_len(2 * P).await.unwrap();
    other.lease_len(P).await.unwrap();
    driver.alloc_len(1).await.unwrap();

    let session = driver.name().trim_start_matches("sessions/");
    let id = lease.mapping_id.to_string();
    let table = ctl.ok(&["get", "leases", "d0"]);
    let line = table.lines().find(|line| line.contains("8 KiB")).unwrap();
    let cells: Vec<_> = line.split_whitespace().collect();
    let iova = format!("{:#x}", lease.iova);
    assert_eq!(cells, [&iova, "8", "KiB", &id, session, "live"]);
    assert_eq!(table.lines().count(), 3, "{table}");
    let range = format!("{iova}-{:#x}", lease.iova + 2 * P - 1);
    assert!(
        ctl.ok(&["get", "leases", "d0", "-o", "wide"])
            .contains(&range)
    );
    let json = ctl.json(&["get", "leases", "d0", "--session", session]);
    let listed = json["leases"].as_array().unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0]["mappingId"], id);
    assert_eq!(listed[0]["session"], driver.name());
    let names = ctl.ok(&["get", "leases", "d0", "--session", session, "-o", "name"]);
    assert_eq!(names, format!("domains/d0/mappings/{id}\n"));
    let described = ctl.ok(&["describe", "domain", "d0"]);
    assert!(described.contains("2 (12 KiB)"), "{described}");
    let said = ctl.run(&["delete", "domain", "d0"]);
    assert_ne!(said.code, 0);
    assert!(said.stderr.contains("2 leases"), "{said:?}");
    let [mut driver, mut other] = [driver, other].map(|raw| Acker { raw });
    let reset = move || ctl.ok(&["reset-bounce", "d0", "--force"]);
    let reset = tokio::task::spawn_blocking(reset);
    let (reset, ..) = tokio::join!(reset, say_gone(&mut driver), say_gone(&mut other));
    let reset = reset.unwrap();
    assert!(reset.contains("2 leases ended"), "{reset}");
}
