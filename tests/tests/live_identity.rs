//! Who is who between real processes: a pid that is used again, a peer whose
//! user the daemon cannot name, and sessions that know each other's handles.

use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use domaind_tests::actor::text;
use domaind_tests::direct::{EVERYTHING, Table};
use domaind_tests::knock::{self, Verdict};
use domaind_tests::namespace::{self, Where};
use domaind_tests::node::name;
use domaind_tests::raw::{Memory, Wire, attach, unmap_entry};
use domaind_tests::users::{self, ALICE};
use domaind_tests::v1::Direction::{Bidirectional, ToDevice};
use domaind_tests::v1::SyncTarget::{ForCpu, ForDevice};
use domaind_tests::v1::client_frame::Body as AskBody;
use domaind_tests::v1::server_frame::Body as AnswerBody;
use domaind_tests::{
    Actor, Ask, Caller, Code, Node, P, Raw, Reason, Refused, children, refused, v1, wait,
};
use rustix::process::Signal;

/// Pages of the direct space, above the apertures.
const OWNERS: u64 = 1 << 20;
const OTHERS: u64 = OWNERS + 16;
const FREE: u64 = OWNERS + 32;

// ----

fn verdicts(value: serde_json::Value) -> Vec<Verdict> {
    serde_json::from_value(value).expect("verdicts")
}

/// Connections to a socket, those that wait to be accepted included, and itself.
fn connections(path: &Path) -> usize {
    let all = fs::read_to_string("/proc/self/net/unix").expect("/proc is there");
    // It keeps the private name under which it was bound, `.{name}.{pid}`.
    let dir = path.parent().and_then(Path::to_str).expect("UTF-8");
    let name = path.file_name().and_then(OsStr::to_str).expect("UTF-8");
    let is_its = |line: &&str| line.contains(dir) && line.contains(name);
    all.lines().filter(is_its).count()
}

/// A process that has attached, and its session and token.
fn attached(node: &Node) -> (Actor, String, String) {
    let mut actor = Actor::start(node);
    let domain = "d0".to_owned();
    let given = actor.must(&Ask::AttachByHand { domain });
    (actor, text(&given["session"]), text(&given["token"]))
}

/// None of them was done, and none for another reason than that the session is
/// over or somebody else's.
#[track_caller]
fn assert_nobodys(verdicts: &[Verdict]) {
    assert!(verdicts.len() >= 10, "{verdicts:?}");
    for verdict in verdicts {
        let is_over = verdict.is(Code::NotFound, Reason::NoSuchSession);
        let is_anothers = verdict.is(Code::PermissionDenied, Reason::WrongPeer);
        assert!(is_over || is_anothers, "{verdict:?}");
    }
}

/// The daemon is stopped while a client dies and another process gets its
/// pid, so that it hears of the death and of the successor at once; and again
/// while it runs.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn pid_reuse() {
    let reuses = match namespace::enter("pid_reuse") {
        Where::Inside => true,
        Where::Done => return,
        Where::Forbidden(why) => {
            println!("no pid can be had again here ({why}): the successor has another one");
            false
        }
    };
    let node = Node::start().await;
    node.domain("d0").await;
    let usage = node.usage("d0").await;
    // One who runs may start a thread that takes the pid: then somebody else dies.
    // Which of the two it hears of first is by chance, so there are many turns.
    let mut turns = [true, false].repeat(10).into_iter();
    let mut turn = turns.next();
    let mut tries = 0;
    while let Some(stops) = turn {
        tries += 1;
        assert!(tries < 200, "no pid is given again");
        let (mut victim, session, token) = attached(&node);
        let pid = victim.pid();
        let held = node.usage("d0").await;
        assert_eq!((held.sessions, held.memories), (1, 1));
        let before = node.sessions("d0").await[0].peer.clone().expect("a peer");
        assert_eq!(before.pid.cast_unsigned(), pid);

        let api = node.runtime_dir().api_socket();
        if stops {
            children::stop(node.pid());
        }
        let connected = connections(&api);
        assert!(connected > 0, "the socket itself");
        victim.kill();
        let start = || Actor::start(&node);
        let successor = match reuses {
            true => namespace::with_pid(pid, start, Actor::pid),
            false => Some(start()),
        };
        let Some(mut successor) = successor else {
            children::signal(node.pid(), Signal::CONT);
            node.until_usage("d0", usage).await;
            continue;
        };
        assert_eq!(successor.pid() == pid, reuses);
        let token = Some(token);
        let knock = Ask::Knock {
            token,
            admin: false,
        };
        successor.begin(&knock);
        if stops {
            wait::until("a knock at the door", || connections(&api) > connected);
            children::signal(node.pid(), Signal::CONT);
        }

        assert_nobodys(&verdicts(successor.finish().expect("verdicts")));
        node.until_usage("d0", usage).await;
        // Nor does it hear a word of it later.
        for verdict in verdicts(successor.must(&knock)) {
            let is_over = verdict.is(Code::NotFound, Reason::NoSuchSession);
            assert!(is_over, "{verdict:?}");
        }
        let own = successor.attach("d0", v1::Role::Driver);
        assert_ne!(own, session);
        let sessions = node.sessions("d0").await;
        assert_eq!(sessions.len(), 1);
        let after = sessions[0].peer.clone().expect("a peer");
        assert_eq!(after.pid.cast_unsigned(), successor.pid());
        assert_ne!(after.pidfd_inode, before.pidfd_inode, "another process");
        drop(successor);
        node.until_usage("d0", usage).await;
        turn = turns.next();
    }
}

// ----

/// One session and one of each thing that it can hold.
struct Holder {
    raw: Raw,
    memory: Memory,
    streaming: v1::StreamingMapping,
    ring: v1::AllocCoherentResponse,
    direct: (u64, u64),
}

impl Holder {
    async fn new(node: &Node, domain: &str, page: u64) -> Holder {
        let mut raw = Raw::driver(node, domain).await;
        let memory = raw.memory(4 * P).await;
        let entry = memory.entry(0, 8, Bidirectional);
        let streaming = raw.map(entry).await.expect("mapped");
        let ring = raw.alloc_len(P).await.expect("allocated");
        let direct = Caller::session(&raw).map(memory.at(page, 2)).await;
        let direct = domaind_tests::direct::ends(direct.expect("mapped").range);
        Holder {
            raw,
            memory,
            streaming,
            ring,
            direct,
        }
    }

    /// Opens the memory behind a region of the page table.
    async fn open(&mut self, region: u32) -> Refused<v1::MemoryOpened> {
        let open = AskBody::OpenMemory(v1::OpenMemory { region });
        let sent = self.raw.wire.send(open, None).await;
        let packet = self.raw.wire.receive().await.expect("an answer");
        assert_eq!(packet.frame.request_id, sent.expect("sent"));
        match packet.frame.body {
            Some(AnswerBody::MemoryOpened(opened)) => Ok(opened),
            Some(AnswerBody::Refusal(refusal)) => {
                assert!(packet.fd.is_none(), "a refusal brings no fd");
                Err(refusal)
            }
            other => panic!("{other:?} instead of MemoryOpened"),
        }
    }

    /// Ends everything, one by one.
    async fn give_back(&mut self) {
        let unmapped = self.raw.unmap(&self.streaming, None).await;
        assert_eq!(unmapped.expect("still there"), 8);
        let freed = self.raw.free(self.ring.iova, self.ring.mapping_id).await;
        freed.expect("still there");
        let caller = Caller::session(&self.raw);
        let unmapped = caller.unmap(self.direct.0, self.direct.1).await;
        assert_eq!(unmapped.expect("still there"), (1, 2 * P));
        let unregistered = self.raw.unregister(self.memory.id).await;
        unregistered.expect("still there");
    }
}

/// Every call that names something, with what somebody else holds: call and
/// answer.
async fn calls_with(
    own: &mut Holder,
    memory: &Memory,
    mapping: &v1::StreamingMapping,
    ring: &v1::AllocCoherentResponse,
    (start, last): (u64, u64),
) -> Vec<(&'static str, Refused<()>)> {
    let caller = Caller::session(&own.raw);
    let raw = &mut own.raw;
    let entry = memory.entry(0, 8, ToDevice);
    let page = start / P;
    let table = [memory.row(FREE, 1)];
    let both = [own.direct, (start, last)];
    // One's own first: nothing of it may be done either.
    let unmaps = vec![
        unmap_entry(&own.streaming, None),
        unmap_entry(mapping, None),
    ];
    vec![
        ("Map", raw.map(entry).await.map(drop)),
        ("Unmap", raw.unmap(mapping, None).await.map(drop)),
        (
            "Unmap of both",
            raw.unmap_all(unmaps, false).await.map(drop),
        ),
        ("Sync out", raw.sync(mapping, 0, 8, ForDevice).await),
        ("Sync back", raw.sync(mapping, 0, 8, ForCpu).await),
        (
            "FreeCoherent",
            raw.free(ring.iova, ring.mapping_id).await.map(drop),
        ),
        ("UnregisterMemory", raw.unregister(memory.id).await),
        ("MapDirect", caller.map(memory.at(FREE, 1)).await.map(drop)),
        (
            "MapDirect anywhere",
            caller.map(memory.anywhere(1)).await.map(drop),
        ),
        ("MapDirect in a batch", {
            let entries = vec![own.memory.at(FREE, 1), memory.at(FREE + 1, 1)];
            caller.map_all(entries, false).await.map(drop)
        }),
        ("UnmapDirect", caller.unmap(start, last).await.map(drop)),
        (
            "UnmapDirect of both",
            caller.unmap_all(&both).await.map(drop),
        ),
        ("SetMap", caller.set_map(table.to_vec()).await.map(drop)),
        (
            "StreamSetMap",
            caller.stream(caller.chunked(&table, 1)).await.map(drop),
        ),
        (
            "SetMap over it",
            caller.set_map(vec![memory.row(page, 2)]).await.map(drop),
        ),
    ]
}

/// What only the session's own domain can have, each as one entry of a partial
/// batch.
async fn partial_with(own: &Holder, foreign: &Holder) -> Vec<v1::Refusal> {
    let raw = &own.raw;
    let entry = foreign.memory.entry(0, 8, ToDevice);
    let mapped = raw.map_all(vec![entry], true).await.expect("partial");
    let unmap = vec![unmap_entry(&foreign.streaming, None)];
    let unmapped = raw.unmap_all(unmap, true).await.expect("partial");
    let sync = v1::SyncEntry {
        iova: foreign.streaming.iova,
        mapping_id: foreign.streaming.mapping_id,
        offset: 0,
        len_bytes: 8,
        target: ForDevice.into(),
    };
    let synced = raw.sync_all(vec![sync], true).await.expect("partial");
    let direct = Caller::session(raw)
        .map_all(vec![foreign.memory.at(FREE, 1)], true)
        .await
        .expect("partial");
    let mapped = match mapped.results[0].outcome.clone() {
        Some(v1::map_result::Outcome::Refusal(refusal)) => refusal,
        other => panic!("{other:?}"),
    };
    let direct = match direct.results[0].outcome.clone() {
        Some(v1::map_direct_result::Outcome::Refusal(refusal)) => refusal,
        other => panic!("{other:?}"),
    };
    let unmapped = unmapped.results[0].refusal.clone().expect("refused");
    let synced = synced.results[0].refusal.clone().expect("refused");
    vec![mapped, unmapped, synced, direct]
}

/// Without the numbers that were asked for.
fn in_words(text: &str) -> String {
    let words = text.split_whitespace();
    let words = words.map(|word| match word.contains(|c: char| c.is_ascii_digit()) {
        true => "#",
        false => word,
    });
    words.collect::<Vec<_>>().join(" ")
}

/// Everything that the domain holds, and that each session says it holds.
async fn holdings(
    node: &Node,
    holders: [&Holder; 2],
) -> (Table, v1::DomainUsage, Vec<v1::Mapping>) {
    let mut own = Vec::new();
    for holder in holders {
        let request = v1::ListMappingsRequest {
            session: holder.raw.name().to_owned(),
            ..Default::default()
        };
        own.extend(Caller::session(&holder.raw).list_all(request).await);
    }
    assert_eq!(own.len(), 6, "{own:?}");
    (Table::of(node, "d0").await, node.usage("d0").await, own)
}

/// A-03, in one domain: what belongs to another session is there, and not to
/// be had.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn cross_session_handles() {
    let node = Node::start().await;
    node.domain("d0").await;
    let mut owner = Holder::new(&node, "d0", OWNERS).await;
    let mut other = Holder::new(&node, "d0", OTHERS).await;
    let before = holdings(&node, [&owner, &other]).await;

    for _ in 0..2 {
        let Holder {
            memory,
            streaming,
            ring,
            direct,
            ..
        } = &owner;
        let answers = calls_with(&mut other, memory, streaming, ring, *direct).await;
        for (call, answer) in answers {
            let Err(refusal) = answer else {
                panic!("{call} was done");
            };
            let said = (refusal.grpc_code(), refusal.reason());
            assert_eq!(
                said,
                (Code::PermissionDenied, Reason::NotYours),
                "{call}: {refusal:?}"
            );
        }
        for refusal in partial_with(&other, &owner).await {
            let said = (refusal.grpc_code(), refusal.reason());
            assert_eq!(
                said,
                (Code::PermissionDenied, Reason::NotYours),
                "{refusal:?}"
            );
        }
        let caller = Caller::session(&other.raw);
        for ranges in [
            vec![EVERYTHING],
            vec![owner.direct],
            vec![other.direct, owner.direct],
        ] {
            let denied = (Code::PermissionDenied, Reason::NotYours);
            refused(caller.clear(&ranges).await, denied.0, denied.1);
            refused(caller.unmap_all(&ranges).await, denied.0, denied.1);
        }
        let empty = caller.set_map(Vec::new()).await;
        refused(empty, Code::PermissionDenied, Reason::NotYours);
        // One name of each: neither is anything.
        let mixed = [
            (owner.streaming.iova, other.streaming.mapping_id),
            (other.streaming.iova, owner.streaming.mapping_id),
            (other.ring.iova, owner.streaming.mapping_id),
        ];
        for (iova, mapping_id) in mixed {
            let mixed = v1::StreamingMapping {
                iova,
                mapping_id,
                len_bytes: 8,
            };
            other.raw.unmap(&mixed, None).await.expect_err("a mixture");
            let synced = other.raw.sync(&mixed, 0, 8, ForDevice).await;
            synced.expect_err("a mixture");
            let freed = other.raw.free(iova, mapping_id).await;
            freed.expect_err("a mixture");
        }
        std::mem::swap(&mut owner, &mut other);
    }

    assert_eq!(holdings(&node, [&owner, &other]).await, before);
    owner.give_back().await;
    other.give_back().await;
}

/// A-03, between domains: what is another domain's never was.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn handles_of_another_domain_look_as_if_they_had_never_been() {
    let node = Node::start().await;
    node.domain("d0").await;
    node.domain("d1").await;
    let mut owner = Holder::new(&node, "d0", OWNERS).await;
    let mut witness = Holder::new(&node, "d0", OTHERS).await;
    // Of its own it has nothing that could have one of those names.
    let mut stranger = Holder::new(&node, "d1", FREE + 64).await;
    stranger.give_back().await;
    let before = holdings(&node, [&owner, &witness]).await;

    let never = Holder {
        raw: Raw::driver(&node, "d1").await,
        memory: Memory {
            fd: owner.memory.fd.try_clone().expect("dup"),
            id: owner.memory.id + 1_000_000,
        },
        streaming: v1::StreamingMapping {
            iova: owner.streaming.iova + 64 * P,
            mapping_id: owner.streaming.mapping_id + 1_000_000,
            len_bytes: 8,
        },
        ring: v1::AllocCoherentResponse {
            iova: owner.ring.iova + 64 * P,
            mapping_id: owner.ring.mapping_id + 1_000_000,
            len_bytes: P,
        },
        direct: (owner.direct.0 + 64 * P, owner.direct.1 + 64 * P),
    };
    let mut answers = Vec::new();
    for of in [&owner, &never] {
        let Holder {
            memory,
            streaming,
            ring,
            direct,
            ..
        } = of;
        answers.push(calls_with(&mut stranger, memory, streaming, ring, *direct).await);
    }
    let never_was = answers.pop().expect("two");
    let foreign = answers.pop().expect("two");
    for ((call, foreign), (_, never_was)) in foreign.into_iter().zip(never_was) {
        let (Err(foreign), Err(never_was)) = (foreign, never_was) else {
            panic!("{call} was done");
        };
        assert_eq!(foreign.grpc_code(), Code::NotFound, "{call}: {foreign:?}");
        assert_eq!(foreign.reason(), never_was.reason(), "{call}");
        assert_eq!(
            in_words(&foreign.message),
            in_words(&never_was.message),
            "{call}"
        );
    }
    // Nothing leads to any region there, nor to what the other domain can open.
    let mut foreign = Vec::new();
    for region in [2, 3, 4, 1_000] {
        let refusal = stranger.open(region).await.expect_err("nothing is there");
        assert_eq!(refusal.grpc_code(), Code::NotFound, "{refusal:?}");
        foreign.push((refusal.reason, in_words(&refusal.message)));
    }
    foreign.dedup();
    assert_eq!(foreign.len(), 1, "one looks different: {foreign:?}");
    let refusal = witness.open(1_000).await.expect_err("no such region");
    assert_eq!(foreign[0], (refusal.reason, in_words(&refusal.message)));
    // The domain by its name, with a token of another one.
    let mut said = Vec::new();
    for named in ["d0", "d9"] {
        let caller = Caller::session(&stranger.raw).naming(&name(named));
        let (start, last) = owner.direct;
        let answers = [
            caller
                .translate(start, last, v1::Perm::Read)
                .await
                .map(drop),
            caller.lookup(start, last).await.map(drop),
            caller.clear(&[EVERYTHING]).await.map(drop),
            caller.unmap(start, last).await.map(drop),
            caller.set_map(Vec::new()).await.map(drop),
            caller.reset(true).await.map(drop),
            caller.map(owner.memory.at(FREE, 1)).await.map(drop),
            caller
                .list(v1::ListMappingsRequest::default())
                .await
                .map(drop),
        ];
        said.push(answers.map(|answer| {
            let refusal = refused(answer, Code::NotFound, Reason::NoSuchDomain);
            refusal.message.replace(named, "d?")
        }));
    }
    assert_eq!(said[0], said[1], "the name of a domain that is there");

    assert_eq!(holdings(&node, [&owner, &witness]).await, before);
    owner.give_back().await;
    witness.give_back().await;
}

/// the token of a session of another process is worth nothing here, at
/// either door, and the session goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_token_of_another_process_is_denied_in_this_one() {
    let node = Node::start().await;
    node.domain("d0").await;
    let (victim, session, token) = attached(&node);
    let own = Raw::driver(&node, "d0").await;
    let usage = node.usage("d0").await;
    for channel in [node.client().await.channel(), node.admin().channel()] {
        for verdict in knock::mapping_calls(channel, Some(&token)).await {
            let is_denied = verdict.is(Code::PermissionDenied, Reason::WrongPeer);
            assert!(is_denied, "{verdict:?}");
        }
    }
    assert_eq!(node.usage("d0").await, usage);
    let sessions = node.sessions("d0").await;
    assert!(sessions.iter().any(|it| it.name == session));
    assert_ne!(own.name(), session);
    drop(victim);
}

// ----

/// What the daemon says to somebody whose user it cannot name.
const UNNAMED: &str = "allow_unattested";

async fn assert_unattested(node: &Node) {
    let client = node.client().await;
    for verdict in knock::names(&client, "d0", "sessions/1").await {
        let is_refused = verdict.is(Code::PermissionDenied, Reason::Unattested);
        assert!(is_refused, "{verdict:?}");
        assert!(verdict.message.contains("65534"), "{verdict:?}");
        assert!(verdict.message.contains(UNNAMED), "{verdict:?}");
    }
    let mut wire = Wire::connect(&node.runtime_dir().fd_socket());
    wire.hello().await;
    for role in [v1::Role::Driver, v1::Role::Device] {
        let ask = attach(&name("d0"), role, v1::Access::ReadWrite);
        let answer = wire.ask(ask, None).await;
        let refusal = refused(answer, Code::PermissionDenied, Reason::Unattested);
        assert!(refusal.message.contains("65534"), "{refusal:?}");
        assert!(refusal.message.contains(UNNAMED), "{refusal:?}");
    }
}

/// In a user namespace without a map nobody has a name, whoever runs the
/// tests; and the operator has none either.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn overflow_uid_refused() {
    if let Err(why) = children::tries(&["unshare", "--user", "true"]) {
        panic!("the kernel gives no user namespace to see an unnamed peer from: {why}");
    }
    let node = Node::started_by(&["unshare", "--user"], &[]).await;
    assert_unattested(&node).await;
    let refusal = node.create("d0", node_spec()).await;
    refused(refusal, Code::PermissionDenied, Reason::Unattested);
    drop(node);

    // The policy is what lets them in, and nothing else.
    let node = Node::started_by(&["unshare", "--user"], &["--policy-allow-unattested=true"]).await;
    node.domain("d0").await;
    Raw::driver(&node, "d0").await;
}

fn node_spec() -> v1::DomainSpec {
    domaind_tests::node::spec(1 << 20, 0)
}

/// A-05, the other way: whom the daemon can name it serves, beside somebody
/// whom it cannot. It takes two users.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_named_user_is_served_beside_an_unnamed_one() {
    if !users::is_root() {
        println!("one user alone is either named or not: overflow_uid_refused shows the latter");
        let node = Node::started_by(&["unshare", "--user", "--map-root-user"], &[]).await;
        node.domain("d0").await;
        Raw::driver(&node, "d0").await;
        return;
    }
    let node = Node::started_by(&["unshare", "--user", "--map-root-user"], &[]).await;
    node.domain("d0").await;
    let dir = node.runtime_dir();
    // It has no group that could be let in: its namespace maps none.
    let doors = [
        (dir.public().to_owned(), 0o755),
        (dir.api_socket(), 0o666),
        (dir.fd_socket(), 0o666),
    ];
    for (path, mode) in doors {
        fs::set_permissions(path, Permissions::from_mode(mode)).expect("chmod");
    }
    let mut driver = Raw::driver(&node, "d0").await;
    let usage = node.usage("d0").await;
    let mut alice = Actor::start_as(&node, ALICE);

    let names = verdicts(alice.must(&Ask::Names {
        domain: "d0".into(),
        session: driver.name().to_owned(),
    }));
    let token = Some(driver.token());
    let knocks = verdicts(alice.must(&Ask::Knock {
        token,
        admin: false,
    }));
    for verdict in names.iter().chain(&knocks) {
        let is_refused = verdict.is(Code::PermissionDenied, Reason::Unattested);
        assert!(is_refused, "{verdict:?}");
        assert!(verdict.message.contains("uid 65534"), "{verdict:?}");
    }
    let create = Ask::Create {
        domain: "alices".into(),
    };
    refused(
        alice.ask(&create),
        Code::PermissionDenied,
        Reason::Unattested,
    );
    let attach = Ask::Attach {
        domain: "d0".into(),
        role: v1::Role::Device,
        access: v1::Access::ReadWrite,
    };
    refused(
        alice.ask(&attach),
        Code::PermissionDenied,
        Reason::Unattested,
    );

    assert_eq!(node.usage("d0").await, usage);
    driver.memory(P).await;
}
