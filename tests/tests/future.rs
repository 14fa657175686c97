//! P-03: clients of a later version. What they say beyond what this daemon
//! knows is ignored where it is a field, and refused where it is a value.

use domaind_proto::v1::client_frame::Body as Ask;
use domaind_proto::v1::server_frame::Body as Answer;
use domaind_tests::bytes::{self, put_message, with_unknown_fields};
use domaind_tests::direct::{Table, range};
use domaind_tests::node::spec;
use domaind_tests::raw::{Memory, Wire, attach, hello, register};
use domaind_tests::refusal::answer;
use domaind_tests::v1::Direction::ToDevice;
use domaind_tests::v1::{self, Perm};
use domaind_tests::{Caller, Code, Node, P, Raw, Reason, Refused, files, node, refused};
use prost::Message;
use rustix::fd::AsRawFd;

struct Bench {
    node: Node,
    driver: Raw,
    memory: Memory,
    caller: Caller,
}

impl Bench {
    async fn new() -> Bench {
        let node = Node::start().await;
        node.create("d0", spec(64 * P, 16 * P)).await.unwrap();
        let mut driver = Raw::driver(&node, "d0").await;
        let memory = driver.memory(16 * P).await;
        let caller = Caller::session(&driver);
        Bench {
            node,
            driver,
            memory,
            caller,
        }
    }

    /// Sends bytes to a call of `domaind.v1`, and reads the answer.
    async fn ask<T: Message + Default>(&self, call: &str, message: Vec<u8>) -> Refused<T> {
        let token = call.starts_with("Mapping").then(|| self.driver.token());
        let channel = self.node.admin().channel();
        let answer = bytes::call(channel, call, message, token.as_deref()).await?;
        Ok(T::decode(answer.as_slice()).expect("an answer"))
    }

    /// The same message, from a client that knows more fields.
    async fn later<T: Message + Default>(&self, call: &str, message: &impl Message) -> Refused<T> {
        self.ask(call, with_unknown_fields(message.encode_to_vec()))
            .await
    }
}

/// Fields that nobody knows, in the request and in its entries.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn unknown_fields_and_future_enum() {
    let bench = Bench::new().await;
    let (memory, name) = (&bench.memory, node::name("d0"));
    files::poke(&memory.fd, 0, b"as before");

    // Domains and sessions.
    let create = v1::CreateDomainRequest {
        domain_id: "d1".into(),
        spec: Some(spec(0, 0)),
        ..Default::default()
    };
    let created: v1::Domain = bench
        .later("DomainService/CreateDomain", &create)
        .await
        .unwrap();
    assert_eq!(created.name, "domains/d1");
    let get = v1::GetDomainRequest {
        name: created.name.clone(),
    };
    let got: v1::Domain = bench.later("DomainService/GetDomain", &get).await.unwrap();
    assert_eq!(got, created);
    let list = v1::ListDomainsRequest::default();
    let page: v1::ListDomainsResponse = bench
        .later("DomainService/ListDomains", &list)
        .await
        .unwrap();
    assert_eq!(page.domains.len(), 2);
    let update = v1::UpdateDomainRequest {
        name: created.name.clone(),
        scrub: v1::Scrub::OnUnmap.into(),
        ..Default::default()
    };
    let updated: v1::Domain = bench
        .later("DomainService/UpdateDomain", &update)
        .await
        .unwrap();
    assert_eq!(updated.scrub(), v1::Scrub::OnUnmap);
    let delete = v1::DeleteDomainRequest {
        name: created.name,
        ..Default::default()
    };
    let _: v1::DeleteDomainResponse = bench
        .later("DomainService/DeleteDomain", &delete)
        .await
        .unwrap();
    assert_eq!(bench.node.counts().await.domains, 1);
    let victim = Raw::device(&bench.node, "d0").await;
    let list = v1::ListSessionsRequest::default();
    let page: v1::ListSessionsResponse = bench
        .later("SessionService/ListSessions", &list)
        .await
        .unwrap();
    assert_eq!(page.sessions.len(), 2);
    let get = v1::GetSessionRequest {
        name: victim.name().to_owned(),
    };
    let session: v1::Session = bench
        .later("SessionService/GetSession", &get)
        .await
        .unwrap();
    assert_eq!(session.role(), v1::Role::Device);
    let evict = v1::EvictSessionRequest {
        name: session.name,
        ..Default::default()
    };
    let _: v1::EvictSessionResponse = bench
        .later("SessionService/EvictSession", &evict)
        .await
        .unwrap();
    let list = v1::ListMemoriesRequest {
        domain: name.clone(),
        ..Default::default()
    };
    let page: v1::ListMemoriesResponse = bench
        .later("SessionService/ListMemories", &list)
        .await
        .unwrap();
    assert_eq!(page.memories.len(), 1);
    let info: v1::Info = bench
        .later("AdminService/GetInfo", &v1::GetInfoRequest {})
        .await
        .unwrap();
    assert_eq!(info.pid, bench.node.pid());

    // What is bounced, and coherent; the entries know more, too.
    let mut map = Vec::new();
    let entry = memory.entry(0, 9, ToDevice).encode_to_vec();
    put_message(&mut map, 1, &with_unknown_fields(entry));
    let mapped: v1::MapResponse = bench
        .ask("MappingService/Map", with_unknown_fields(map))
        .await
        .unwrap();
    let Some(v1::map_result::Outcome::Mapping(mapping)) = mapped.results[0].outcome.clone() else {
        panic!("{mapped:?}");
    };
    assert_eq!(bench.driver.read(mapping.iova, 9), b"as before");
    let sync = v1::SyncRequest {
        entries: vec![v1::SyncEntry {
            iova: mapping.iova,
            mapping_id: mapping.mapping_id,
            offset: 0,
            len_bytes: 9,
            target: v1::SyncTarget::ForDevice.into(),
        }],
        ..Default::default()
    };
    let _: v1::SyncResponse = bench.later("MappingService/Sync", &sync).await.unwrap();
    let unmap = v1::UnmapRequest {
        entries: vec![domaind_tests::raw::unmap_entry(&mapping, None)],
        ..Default::default()
    };
    let _: v1::UnmapResponse = bench.later("MappingService/Unmap", &unmap).await.unwrap();
    let alloc = v1::AllocCoherentRequest {
        len_bytes: 77,
        ..Default::default()
    };
    let ring: v1::AllocCoherentResponse = bench
        .later("MappingService/AllocCoherent", &alloc)
        .await
        .unwrap();
    assert_eq!(ring.len_bytes, 77);
    let free = v1::FreeCoherentRequest {
        iova: ring.iova,
        mapping_id: ring.mapping_id,
        ..Default::default()
    };
    let _: v1::FreeCoherentResponse = bench
        .later("MappingService/FreeCoherent", &free)
        .await
        .unwrap();

    // The direct table; ranges know more, too.
    let mut set_map = Vec::new();
    let mut row = Vec::new();
    put_message(
        &mut row,
        1,
        &with_unknown_fields(range(100 * P, 101 * P - 1).encode_to_vec()),
    );
    let rest = v1::DirectMapping {
        range: None,
        ..memory.row(0, 1)
    };
    row.extend(rest.encode_to_vec());
    put_message(&mut set_map, 2, &with_unknown_fields(row));
    let set: v1::SetMapResponse = bench
        .ask("MappingService/SetMap", with_unknown_fields(set_map))
        .await
        .unwrap();
    assert_eq!(set.added, 1);
    let map = v1::MapDirectRequest {
        entries: vec![memory.at(200, 1)],
        ..Default::default()
    };
    let _: v1::MapDirectResponse = bench.later("MappingService/MapDirect", &map).await.unwrap();
    let translate = v1::TranslateRequest {
        range: Some(range(100 * P, 101 * P - 1)),
        want: Perm::Read.into(),
        ..Default::default()
    };
    let translated: v1::TranslateResponse = bench
        .later("MappingService/Translate", &translate)
        .await
        .unwrap();
    assert_eq!(translated.pieces.len(), 1);
    let lookup = v1::LookupRequest {
        range: Some(range(0, u64::MAX)),
        ..Default::default()
    };
    let found: v1::Mapping = bench.later("MappingService/Lookup", &lookup).await.unwrap();
    assert_eq!(found.iova, 100 * P);
    let list = v1::ListMappingsRequest::default();
    let page: v1::ListMappingsResponse = bench
        .later("MappingService/ListMappings", &list)
        .await
        .unwrap();
    assert_eq!(page.mappings.len(), 2);
    let unmap = v1::UnmapDirectRequest {
        ranges: vec![range(200 * P, 201 * P - 1)],
        ..Default::default()
    };
    let _: v1::UnmapDirectResponse = bench
        .later("MappingService/UnmapDirect", &unmap)
        .await
        .unwrap();
    let clear = v1::ClearMapRequest {
        ranges: vec![range(0, u64::MAX)],
        ..Default::default()
    };
    let cleared: v1::ClearMapResponse = bench
        .later("MappingService/ClearMap", &clear)
        .await
        .unwrap();
    assert_eq!(cleared.removed_mappings, 1);
    let reset = v1::ResetBounceRequest::default();
    let _: v1::ResetBounceResponse = bench
        .later("MappingService/ResetBounce", &reset)
        .await
        .unwrap();
    let whole = v1::StreamSetMapRequest {
        header: Some(v1::SetMapHeader::default()),
        entries: vec![memory.row(300, 1)],
        commit: true,
    };
    let chunk = with_unknown_fields(whole.encode_to_vec());
    let token = bench.driver.token();
    let channel = bench.node.admin().channel();
    let set = bytes::stream(
        channel,
        "MappingService/StreamSetMap",
        vec![chunk],
        Some(&token),
    )
    .await;
    let set = v1::StreamSetMapResponse::decode(set.unwrap().as_slice()).unwrap();
    assert_eq!(set.outcome.unwrap().added, 1);
}

/// Values of enums that nobody knows, in each field that has one.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn future_values_of_enums_are_refused_and_change_nothing() {
    let bench = Bench::new().await;
    bench.caller.map(bench.memory.at(100, 1)).await.unwrap();
    let mapping = bench
        .driver
        .map(bench.memory.entry(0, 9, ToDevice))
        .await
        .unwrap();
    let before = (
        Table::of(&bench.node, "d0").await,
        bench.node.counts().await,
    );
    let invalid = Code::InvalidArgument;
    // 5: the least that none of these enums has.
    for odd in [5, 77, 1 << 20, i32::MAX, -1, i32::MIN] {
        let entry = v1::MapEntry {
            direction: odd,
            ..bench.memory.entry(0, 9, ToDevice)
        };
        refused(
            bench.driver.map(entry).await,
            invalid,
            Reason::UnknownDirection,
        );
        let part = v1::SyncEntry {
            iova: mapping.iova,
            mapping_id: mapping.mapping_id,
            len_bytes: 1,
            target: odd,
            ..Default::default()
        };
        let synced = bench.driver.sync_all(vec![part], false).await;
        refused(synced, invalid, Reason::Malformed);
        let entry = v1::MapDirectEntry {
            perm: odd,
            ..bench.memory.at(200, 1)
        };
        refused(bench.caller.map(entry).await, invalid, Reason::UnknownPerm);
        let row = v1::DirectMapping {
            perm: odd,
            ..bench.memory.row(200, 1)
        };
        refused(
            bench.caller.set_map(vec![row]).await,
            invalid,
            Reason::UnknownPerm,
        );
        let streamed = bench.caller.stream(bench.caller.chunked(&[row], 1)).await;
        refused(streamed, invalid, Reason::UnknownPerm);
        let translate = bench.caller.signed(v1::TranslateRequest {
            domain: String::new(),
            range: Some(range(100 * P, 100 * P)),
            want: odd,
        });
        let translated = answer(bench.caller.calls().translate(translate).await);
        refused(translated, invalid, Reason::UnknownPerm);
        let list = v1::ListMappingsRequest {
            kind: odd,
            ..Default::default()
        };
        refused(bench.caller.list(list).await, invalid, Reason::Malformed);
        for spec in [
            v1::DomainSpec {
                backing: odd,
                ..spec(0, 0)
            },
            v1::DomainSpec {
                scrub: odd,
                ..spec(0, 0)
            },
        ] {
            refused(
                bench.node.create("d1", spec).await,
                invalid,
                Reason::Malformed,
            );
        }
        let update = v1::UpdateDomainRequest {
            name: node::name("d0"),
            scrub: odd,
            ..Default::default()
        };
        refused(bench.node.update(update).await, invalid, Reason::Malformed);
        for (role, access) in [(odd, 2), (2, odd)] {
            let mut wire = Wire::connect(&bench.node.runtime_dir().fd_socket());
            wire.hello().await;
            let attach = Ask::Attach(v1::Attach {
                domain: node::name("d0"),
                role,
                access,
                ..v1::Attach::default()
            });
            refused(wire.ask(attach, None).await, invalid, Reason::Malformed);
        }
    }
    // One entry that is odd among others, with `partial`, is the only one.
    let batch = vec![
        bench.memory.at(200, 1),
        v1::MapDirectEntry {
            perm: 99,
            ..bench.memory.at(201, 1)
        },
    ];
    let results = bench.caller.map_all(batch, true).await.unwrap().results;
    assert!(matches!(
        results[0].outcome,
        Some(v1::map_direct_result::Outcome::Mapping(_))
    ));
    let Some(v1::map_direct_result::Outcome::Refusal(refusal)) = &results[1].outcome else {
        panic!("{results:?}");
    };
    assert_eq!(refusal.reason(), Reason::UnknownPerm);
    bench.caller.unmap(200 * P, 201 * P - 1).await.unwrap();
    let after = Table::of(&bench.node, "d0").await;
    assert_eq!(after.mappings, before.0.mappings);
    assert_eq!(bench.node.counts().await.but_fds(), before.1.but_fds());
}

/// Frames of the fd socket with fields that nobody knows.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn frames_with_unknown_fields_are_understood() {
    let node = Node::start().await;
    node.create("d0", spec(16 * P, 0)).await.unwrap();
    let mut wire = Wire::connect(&node.runtime_dir().fd_socket());
    let frame = |request_id, body: Ask| {
        let frame = v1::ClientFrame {
            request_id,
            body: Some(body),
        };
        with_unknown_fields(frame.encode_to_vec())
    };
    wire.send_packet(&frame(1, hello(1, 1)), &[]).unwrap();
    let packet = wire.receive().await.unwrap();
    assert!(
        matches!(packet.frame.body, Some(Answer::Welcome(_))),
        "{packet:?}"
    );
    let (role, access) = (v1::Role::Driver, v1::Access::ReadWrite);
    wire.send_packet(&frame(2, attach("domains/d0", role, access)), &[])
        .unwrap();
    let packet = wire.receive().await.unwrap();
    assert!(
        matches!(packet.frame.body, Some(Answer::Attached(_))),
        "{packet:?}"
    );
    // The coherent aperture, the page table, the session page.
    for _ in 0..3 {
        let packet = wire.receive().await.unwrap();
        assert!(
            matches!(packet.frame.body, Some(Answer::Region(_))),
            "{packet:?}"
        );
    }
    let packet = wire.receive().await.unwrap();
    assert!(
        matches!(packet.frame.body, Some(Answer::Ready(_))),
        "{packet:?}"
    );
    let memfd = files::good_memfd(P);
    wire.send_packet(&frame(3, register(true)), &[memfd.as_raw_fd()])
        .unwrap();
    let packet = wire.receive().await.unwrap();
    let Some(Answer::MemoryRegistered(registered)) = packet.frame.body else {
        panic!("{packet:?}");
    };
    let memory_id = registered.memory_id;
    let unregister = Ask::UnregisterMemory(v1::UnregisterMemory { memory_id });
    wire.send_packet(&frame(4, unregister), &[]).unwrap();
    let packet = wire.receive().await.unwrap();
    assert!(
        matches!(packet.frame.body, Some(Answer::MemoryUnregistered(_))),
        "{packet:?}"
    );
    // A body that nobody knows is a refusal or the end, and harms nobody else.
    let mut unknown = Vec::new();
    put_message(&mut unknown, 99, b"");
    wire.send_packet(&unknown, &[]).unwrap();
    match wire.receive().await.map(|packet| packet.frame.body) {
        Some(Some(Answer::Refusal(refusal))) => {
            assert_eq!(refusal.grpc_code(), Code::InvalidArgument, "{refusal:?}");
            wire.settle().await;
        }
        None | Some(Some(Answer::SessionEnded(_))) => {}
        other => panic!("{other:?}"),
    }
    Raw::driver(&node, "d0").await;
}
