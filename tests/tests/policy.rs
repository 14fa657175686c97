//! Who may do what: rules of the configuration file, pods as owners, and what is
//! written down about it.

use domaind_tests::actor::text;
use domaind_tests::knock::Verdict;
use domaind_tests::pod::PodCgroup;
use domaind_tests::users::{self, ALICE, BOB, User};
use domaind_tests::{Actor, Code, Ctl, Node, Reason, refused, script, v1, wait};
use serde_json::Value;

const DENY: &str = "[policy]\ndefault = 'deny'\n";

/// The user that the actors of a test are: a stranger if root runs it.
fn actors_uid() -> u32 {
    if users::is_root() {
        ALICE.uid
    } else {
        users::own_uid()
    }
}

fn actor(node: &Node) -> Actor {
    match users::is_root() {
        true => Actor::start_as(node, ALICE),
        false => Actor::start(node),
    }
}

/// A rule for the actors.
fn rule(name: &str, more: &str) -> String {
    let uid = actors_uid();
    format!("[[policy.rules]]\nname = '{name}'\nuids = [{uid}]\n{more}\n")
}

fn names(actor: &mut Actor, domain: &str, session: &str) -> Vec<Verdict> {
    let verdicts = actor.must(&script::Ask::Names {
        domain: domain.to_owned(),
        session: session.to_owned(),
    });
    serde_json::from_value(verdicts).expect("verdicts")
}

fn attach(domain: &str, role: v1::Role, access: v1::Access) -> script::Ask {
    script::Ask::Attach {
        domain: domain.to_owned(),
        role,
        access,
    }
}

const DRIVER: v1::Role = v1::Role::Driver;
const DEVICE: v1::Role = v1::Role::Device;
const RW: v1::Access = v1::Access::ReadWrite;
const RO: v1::Access = v1::Access::ReadOnly;

fn not_allowed<T: std::fmt::Debug>(answer: Result<T, v1::Refusal>) -> v1::Refusal {
    refused(answer, Code::PermissionDenied, Reason::NotAllowed)
}

/// The last audit line of an event.
fn audited(node: &Node, event: &str) -> Value {
    wait::find("an audit line", || {
        let lines = node.audit();
        lines.into_iter().rfind(|line| line["event"] == event)
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn without_a_rule_deny_gives_nothing_and_says_the_same_of_what_is_not_there() {
    let node = Node::told(DENY).await;
    node.domain("present").await;
    let mut actor = actor(&node);
    let seen = names(&mut actor, "present", "sessions/4711");
    let absent = names(&mut actor, "nowhere", "sessions/4711");
    for (seen, absent) in seen.iter().zip(&absent) {
        let message = seen.message.replace("present", "nowhere");
        assert_eq!(message, absent.message, "{}", seen.call);
        assert_eq!((seen.code, &seen.reason), (absent.code, &absent.reason));
        match seen.call.as_str() {
            "ListDomains" | "ListSessions" => assert_eq!(seen.found, Some(0), "{seen:?}"),
            "GetSession" | "EvictSession" => {
                assert!(seen.is(Code::NotFound, Reason::NoSuchSession), "{seen:?}");
            }
            _ => {
                let denied = seen.is(Code::PermissionDenied, Reason::NotAllowed);
                assert!(
                    denied && seen.message.contains("no rule is for it"),
                    "{seen:?}"
                );
            }
        }
    }
    for domain in ["present", "nowhere"] {
        for role in [DRIVER, DEVICE] {
            not_allowed(actor.ask(&attach(domain, role, RW)));
        }
    }
    let create = script::Ask::Create {
        domain: "mine".into(),
    };
    not_allowed(actor.ask(&create));
    assert!(node.get("mine").await.is_err());
    let line = audited(&node, "create");
    assert_eq!(
        (&line["result"], &line["reason"]),
        (&"denied".into(), &"NOT_ALLOWED".into())
    );
    assert_eq!(line["domain"], "mine");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn who_has_a_rule_sees_and_attaches_as_it_says_and_manages_nothing() {
    let storage = rule("storage", "domains = ['disk-*']\nroles = ['device']");
    let node = Node::told(&format!("{DENY}{storage}")).await;
    node.domain("disk-0").await;
    node.domain("net-0").await;
    let mut actor = actor(&node);
    let session = actor.attach("disk-0", DEVICE);
    for verdict in names(&mut actor, "disk-0", &session) {
        match verdict.call.as_str() {
            "GetDomain"
            | "ListDomains"
            | "ListSessions"
            | "GetSession"
            | "ListSessions of the domain" => assert_eq!(verdict.found, Some(1), "{verdict:?}"),
            "ListMemories" | "ListMappings" => assert_eq!(verdict.found, Some(0), "{verdict:?}"),
            // Nothing is mapped there, which it is told.
            "Translate" | "Lookup" => {
                assert!(verdict.is(Code::NotFound, Reason::NotMapped), "{verdict:?}");
            }
            _ => {
                let denied = verdict.is(Code::PermissionDenied, Reason::NotAllowed);
                assert!(
                    denied && verdict.message.contains("\"storage\""),
                    "{verdict:?}"
                );
            }
        }
    }
    assert_eq!(node.sessions("disk-0").await.len(), 1);
    let mut other = self::actor(&node);
    let refusal = not_allowed(other.ask(&attach("disk-0", DRIVER, RW)));
    assert_eq!(refusal.metadata["rules"], "storage");
    assert_eq!(refusal.metadata["role"], "driver");
    assert!(
        refusal.message.contains("disk-*: device, read-write"),
        "{refusal:?}"
    );
    // The rule lets it know that a name is free, and nothing of other names.
    let answer = other.ask(&attach("disk-9", DEVICE, RW));
    refused(answer, Code::NotFound, Reason::NoSuchDomain);
    let refusal = not_allowed(other.ask(&attach("net-0", DEVICE, RW)));
    assert!(refusal.message.contains("\"storage\""), "{refusal:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_rule_of_read_only_access_gives_no_more() {
    let reads = rule("reads", "domains = ['*']\naccess = 'read-only'");
    let node = Node::told(&format!("{DENY}advisory_read_only = true\n{reads}")).await;
    node.domain("d0").await;
    let mut actor = actor(&node);
    let refusal = not_allowed(actor.ask(&attach("d0", DEVICE, RW)));
    assert_eq!(refusal.metadata["access"], "read-write");
    let attached = actor.must(&attach("d0", DEVICE, RO));
    let session = text(&attached["session"]);
    let line = audited(&node, "attach");
    assert_eq!(line["result"], "granted");
    assert_eq!(line["rule"], "reads");
    assert_eq!(
        (&line["role"], &line["access"]),
        (&"device".into(), &"read-only".into())
    );
    assert_eq!(
        (&line["pid"], &line["uid"]),
        (&actor.pid().into(), &actors_uid().into())
    );
    assert_eq!(line["domain"], "d0");
    assert!(session.ends_with(&line["session"].to_string()), "{line}");
    let denied = node
        .audit()
        .into_iter()
        .find(|line| line["result"] == "denied")
        .unwrap();
    assert_eq!(
        (&denied["event"], &denied["reason"]),
        (&"attach".into(), &"NOT_ALLOWED".into())
    );
    assert_eq!(denied["rule"], "reads");
    assert_eq!(denied["session"], Value::Null);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn who_may_create_by_a_rule_owns_it_and_does_all_with_it_while_the_rule_is_there() {
    let creates = rule("creates", "domains = ['new-*']\ncreate = true");
    let told = format!("{DENY}{creates}");
    let node = Node::told(&told).await;
    let mut actor = actor(&node);
    let create = |domain: &str| script::Ask::Create {
        domain: domain.to_owned(),
    };
    not_allowed(actor.ask(&create("old-1")));
    actor.create("new-1");
    assert_eq!(node.get("new-1").await.unwrap().owner_uid, actors_uid());
    actor.attach("new-1", DRIVER);
    assert_eq!(audited(&node, "attach")["rule"], "(owner)");
    // Without the rule it is not its own any more, as far as the policy goes.
    node.reload(DENY).await.unwrap();
    for verdict in names(&mut actor, "new-1", "sessions/4711") {
        assert!(verdict.found.unwrap_or(0) == 0, "{verdict:?}");
    }
    node.reload(&told).await.unwrap();
    let all = names(&mut actor, "new-1", "sessions/4711");
    let deleted = all.iter().find(|verdict| verdict.call == "DeleteDomain");
    assert_eq!(deleted.unwrap().found, Some(1));
    assert!(node.get("new-1").await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_reload_holds_for_who_comes_and_names_who_would_not_be_let_in_any_more() {
    let storage = rule("storage", "domains = ['d0']");
    let node = Node::told(&format!("{DENY}{storage}")).await;
    node.domain("d0").await;
    let mut inside = actor(&node);
    let session = inside.attach("d0", DRIVER);
    let memory = inside.buffer(4096);
    let reloaded = node.reload(DENY).await.unwrap();
    let [change] = &reloaded.applied[..] else {
        panic!("{reloaded:?}");
    };
    assert_eq!(change.key, "policy.rules");
    assert!(
        change.from.contains(&format!("for uids {}", actors_uid())),
        "{change:?}"
    );
    let [unwelcome] = &reloaded.unwelcome_sessions[..] else {
        panic!("{reloaded:?}");
    };
    assert_eq!((&unwelcome.name, reloaded.unwelcome_count), (&session, 1));
    assert_eq!(unwelcome.peer.as_ref().unwrap().uid, actors_uid());
    let warned = node.log();
    assert!(warned.contains("would not be let in any more"), "{warned}");
    // It stays, and goes on.
    inside.map(memory, 0, 8, v1::Direction::ToDevice);
    not_allowed(actor(&node).ask(&attach("d0", DRIVER, RW)));
    node.evict(&session).await.unwrap();
    assert_eq!(inside.end_reason(), "Evicted");
    let again = node.reload(DENY).await.unwrap();
    assert_eq!(again, v1::ReloadConfigResponse::default());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_file_that_is_not_good_changes_nothing_and_says_what_is_wrong() {
    let storage = rule("storage", "domains = ['d0']");
    let good = format!("{DENY}{storage}");
    let node = Node::told(&good).await;
    node.domain("d0").await;
    for (bad, says) in [
        ("[policy]\ndefualt = 'deny'", "policy.default"),
        (
            "[[policy.rules]]\nname = 'r'\nuids = [1]",
            "\"r\" names no domains",
        ),
        ("[log]\nlevel = 'info=loud'", "log.level"),
        ("[[domains]]\nname = 'D'", "domain 1"),
        ("not TOML", "TOML"),
    ] {
        let refusal = node.reload(bad).await;
        let refusal = refused(refusal, Code::FailedPrecondition, Reason::ConfigRefused);
        assert!(refusal.message.contains(says), "{bad}: {}", refusal.message);
        let ctl = Ctl::new(&node).run(&["reload"]);
        assert_eq!(ctl.code, 6, "{ctl:?}");
        assert!(ctl.stderr.contains(says), "{ctl:?}");
    }
    let mut still = actor(&node);
    still.attach("d0", DRIVER);
    node.tell(&good);
    let ctl = Ctl::new(&node).run(&["reload"]);
    assert_eq!(
        (ctl.code, ctl.stdout.as_str()),
        (0, "nothing has changed\n")
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_needs_a_restart_is_said_and_stays_said() {
    let node = Node::told("").await;
    let file = "[limits]\nack_timeout_ms = 250\nregion_bytes = '1MiB'\n[server]\nworker_threads = 7\n[log]\nlevel = 'debug'";
    let keys = |changes: &[v1::SettingChange]| {
        let keys = changes.iter().map(|change| change.key.clone());
        keys.collect::<Vec<_>>()
    };
    let reloaded = node.reload(file).await.unwrap();
    let wanted = ["limits.region_bytes", "limits.ack_timeout_ms", "log.level"];
    assert_eq!(keys(&reloaded.applied), wanted);
    assert_eq!(keys(&reloaded.restart_required), ["server.worker_threads"]);
    assert_eq!(node.info().await.region_budget_bytes, 1 << 20);
    let refusal = node
        .create("d0", domaind_tests::node::spec(2 << 20, 0))
        .await;
    refused(refusal, Code::ResourceExhausted, Reason::NoMemory);
    // debug is in force.
    wait::until("a line at DEBUG", || {
        node.log().contains("\"level\":\"DEBUG\"")
    });
    let again = node.reload(file).await.unwrap();
    assert!(again.applied.is_empty());
    assert_eq!(keys(&again.restart_required), ["server.worker_threads"]);
    // The same by the signal.
    node.tell("");
    node.hang_up();
    wait::until("the reload", || {
        node.log().matches("configuration reloaded").count() == 3
    });
    node.create("d0", domaind_tests::node::spec(2 << 20, 0))
        .await
        .unwrap();
}

const POD_A: &str = "0f3c2a91-7d54-4b1e-9c88-3f5be1a2d007";
const POD_B: &str = "5a5a5a5a-0000-4000-8000-00000000beef";

/// One of a user in a pod.
fn in_pod(node: &Node, user: User, cgroup: &PodCgroup) -> Actor {
    let actor = Actor::start_as(node, user);
    // It connects when it is asked something.
    cgroup.take(actor.pid());
    actor
}

/// Two pods of one uid are two owners, and neither is that user outside of pods.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn pods_of_one_user_are_owners_of_their_own() {
    if !users::is_root() {
        println!(
            "only root can make the cgroups of pods: the unit tests of placement read such paths"
        );
        return;
    }
    let (a, b) = (
        PodCgroup::make(POD_A, &"a0".repeat(32)),
        PodCgroup::make(POD_B, &"b1".repeat(32)),
    );
    let node = Node::told("").await;
    let mut first = in_pod(&node, ALICE, &a);
    let mut second = in_pod(&node, ALICE, &b);
    let mut outside = Actor::start_as(&node, ALICE);
    first.create("of-a");
    let domain = node.get("of-a").await.unwrap();
    assert_eq!(
        (domain.owner_uid, domain.owner_pod_uid.as_str()),
        (ALICE.uid, POD_A)
    );
    let session = first.attach("of-a", DRIVER);
    for stranger in [&mut second, &mut outside] {
        let answer = stranger.ask(&attach("of-a", DEVICE, RW));
        refused(answer, Code::NotFound, Reason::NoSuchDomain);
        for verdict in names(stranger, "of-a", &session) {
            assert_eq!(verdict.found.unwrap_or(0), 0, "{verdict:?}");
        }
    }
    let line = audited(&node, "attach");
    assert_eq!(
        (&line["result"], &line["pod_uid"]),
        (&"denied".into(), &Value::Null)
    );
    let peer = node.sessions("of-a").await[0].peer.clone().unwrap();
    assert_eq!(
        (peer.pod_uid.as_str(), peer.container_id.as_str()),
        (POD_A, &*"a0".repeat(32))
    );
    assert_eq!(peer.unit, "");
    let wide = Ctl::new(&node)
        .run(&["get", "sessions", "--admin", "-o", "wide"])
        .stdout;
    assert!(
        wide.contains("POD") && wide.contains(POD_A) && wide.contains("a0a0a0a0a0a0  "),
        "{wide}"
    );
    drop((first, second, outside));
}

/// A rule by pod lets that pod in, of whichever user, and no other.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_rule_by_pod_uid_lets_in_that_pod_and_no_other() {
    if !users::is_root() {
        println!(
            "only root can make the cgroups of pods: the unit tests of policy match such peers"
        );
        return;
    }
    const OTHER: &str = "11111111-2222-4333-8444-555555555555";
    let (a, b) = (
        PodCgroup::make(OTHER, &"c2".repeat(32)),
        PodCgroup::make("66666666-2222-4333-8444-555555555555", &"d3".repeat(32)),
    );
    let file = format!(
        "{DENY}[[policy.rules]]\nname = 'pod'\npod_uids = ['{OTHER}']\ndomains = ['shared']\n"
    );
    let node = Node::told(&file).await;
    node.domain("shared").await;
    let mut driver = in_pod(&node, ALICE, &a);
    let mut device = in_pod(&node, BOB, &a);
    driver.attach("shared", DRIVER);
    device.attach("shared", DEVICE);
    let line = audited(&node, "attach");
    assert_eq!(
        (&line["rule"], &line["pod_uid"]),
        (&"pod".into(), &OTHER.into())
    );
    assert_eq!(line["container_id"], "c2".repeat(32));
    let mut third = in_pod(&node, ALICE, &b);
    let refusal = not_allowed(third.ask(&attach("shared", DEVICE, RW)));
    assert!(refusal.message.contains("no rule is for it"), "{refusal:?}");
    // The other user, whom nothing lets in by its uid.
    let mut outside = Actor::start_as(&node, ALICE);
    not_allowed(outside.ask(&attach("shared", DEVICE, RW)));
    drop((driver, device, third, outside));
}

/// A rule by group: primary as well as supplementary would be, seen by the kernel.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_rule_by_group_lets_in_its_members() {
    let gid = match users::is_root() {
        true => ALICE.gid,
        false => rustix::process::getegid().as_raw(),
    };
    let file = format!("{DENY}[[policy.rules]]\nname = 'group'\ngids = [{gid}]\ndomains = ['*']\n");
    let node = Node::told(&file).await;
    node.domain("d0").await;
    actor(&node).attach("d0", DEVICE);
    let file =
        format!("{DENY}[[policy.rules]]\nname = 'group'\ngids = [4000000001]\ndomains = ['*']\n");
    node.reload(&file).await.unwrap();
    not_allowed(actor(&node).ask(&attach("d0", DEVICE, RW)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn who_has_no_session_and_who_asks_for_a_foreign_one_is_written_down() {
    let node = Node::told("").await;
    let client = node.client().await;
    let mapping = client.mappings().map(v1::MapRequest::default()).await;
    mapping.expect_err("it acts for no session");
    let line = audited(&node, "call");
    assert_eq!(
        (&line["result"], &line["reason"]),
        (&"denied".into(), &"NO_SESSION".into())
    );
    assert_eq!(line["uid"], users::own_uid());

    if !users::is_root() {
        eprintln!("not shown: only root can be two users");
        return;
    }
    node.domain("d0").await;
    let mut driver = Actor::start(&node);
    let session = driver.attach("d0", DRIVER);
    let mut stranger = Actor::start_as(&node, ALICE);
    let verdicts = names(&mut stranger, "d0", &session);
    let got = verdicts.iter().find(|verdict| verdict.call == "GetSession");
    let got = got.expect("it was tried");
    assert!(got.is(Code::NotFound, Reason::NoSuchSession), "{got:?}");
    let lines = node.audit();
    let about = lines
        .iter()
        .find(|line| line["reason"] == "NO_SUCH_SESSION");
    let about = about.expect("that it is there and hidden is written down");
    assert_eq!(
        (&about["domain"], &about["uid"]),
        (&"d0".into(), &ALICE.uid.into())
    );
}
