//! Domains of the configuration file: there before the daemon serves, brought in
//! line at a reload, never destroyed while they are used.

use std::process::Stdio;

use domaind_tests::node::domaind;
use domaind_tests::{Actor, Code, Ctl, Node, Reason, refused, v1, wait};

fn declared(name: &str, mib: u64) -> String {
    format!("[[domains]]\nname = '{name}'\nbounce_bytes = '{mib}MiB'\ncoherent_bytes = 0\n")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn declared_domains_are_there_as_soon_as_the_daemon_is() {
    let file = format!(
        "{}{}owner_uid = 4711\n[domains.quotas]\nsessions = 3\n",
        declared("disk-0", 2),
        declared("disk-1", 4)
    );
    let node = Node::told(&file).await;
    let domain = node.get("disk-0").await.unwrap();
    assert!(domain.declared);
    assert_eq!(domain.bounce_bytes, 2 << 20);
    assert_eq!(domain.owner_uid, rustix::process::geteuid().as_raw());
    let other = node.get("disk-1").await.unwrap();
    assert_eq!((other.owner_uid, other.quotas.unwrap().sessions), (4711, 3));
    let text = Ctl::new(&node)
        .run(&["describe", "domain", "disk-0", "--admin"])
        .stdout;
    assert!(
        text.lines()
            .any(|line| line.starts_with("Declared:") && line.ends_with("yes")),
        "{text}"
    );
    let created = node.domain("d0").await;
    assert!(!created.declared);
}

/// It says which and why, binds nothing, and leaves the directory free for the next.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_domain_that_cannot_be_made_fails_the_start_and_leaves_nothing_behind() {
    let dir = tempfile::tempdir_in("/tmp").unwrap();
    let file = dir.path().join("domaind.toml");
    let told = format!(
        "[limits]\nregion_bytes = '8MiB'\n{}{}",
        declared("small", 1),
        declared("large", 64)
    );
    std::fs::write(&file, told).unwrap();
    let serve = || {
        let mut command = domaind();
        command.arg("serve").arg("--config").arg(&file);
        command.arg("--runtime-dir").arg(dir.path().join("run"));
        command.stdin(Stdio::null()).output().unwrap()
    };
    for _ in 0..2 {
        let ended = serve();
        assert_eq!(ended.status.code(), Some(1));
        let told = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert!(told.contains("creating the domain large of"), "{told}");
        assert!(
            told.contains("67108864") && told.contains("8388608"),
            "{told}"
        );
        for name in ["public/api.sock", "public/fd.sock", "admin/admin.sock"] {
            assert!(!dir.path().join("run").join(name).exists(), "{name}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_reload_makes_changes_and_deletes_and_keeps_what_is_used() {
    let node = Node::told(&format!(
        "{}{}{}",
        declared("a", 1),
        declared("b", 1),
        declared("used", 1)
    ))
    .await;
    let mut driver = Actor::driver(&node, "used");
    let memory = driver.buffer(4096);
    let place = driver.map(memory, 0, 8, v1::Direction::ToDevice);
    let uid = node.get("a").await.unwrap().uid;
    let file = format!(
        "{}[domains.quotas]\nsessions = 9\n{}",
        declared("a", 1),
        declared("new", 1)
    );
    let reloaded = node.reload(&file).await.unwrap();
    assert_eq!(reloaded.created_domains, ["domains/new"]);
    assert_eq!(reloaded.updated_domains, ["domains/a"]);
    assert_eq!(reloaded.deleted_domains, ["domains/b"]);
    let [kept] = &reloaded.kept_domains[..] else {
        panic!("{reloaded:?}");
    };
    assert_eq!(kept.name, "domains/used");
    assert!(
        kept.reason.contains("in use: ") && kept.reason.contains("1 session"),
        "{kept:?}"
    );
    let changed = node.get("a").await.unwrap();
    assert_eq!((changed.uid, changed.quotas.unwrap().sessions), (uid, 9));
    refused(node.get("b").await, Code::NotFound, Reason::NoSuchDomain);
    // Another layout than it has, while it is used: it stays as it is.
    let larger = format!("{file}{}", declared("used", 2));
    let reloaded = node.reload(&larger).await.unwrap();
    assert!(
        reloaded.kept_domains[0].reason.contains("layout"),
        "{reloaded:?}"
    );
    driver.unmap(place, None);
    assert_eq!(node.get("used").await.unwrap().bounce_bytes, 1 << 20);
    drop(driver);
    wait::until_equal("the sessions", 0, async || {
        node.usage("used").await.sessions
    })
    .await;
    let mut reloaded = node.reload(&larger).await.unwrap();
    // Who was killed may be looked after for a moment.
    for _ in 0..100 {
        if reloaded.kept_domains.is_empty() {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        reloaded = node.reload(&larger).await.unwrap();
    }
    assert_eq!(reloaded.recreated_domains, ["domains/used"]);
    assert_eq!(node.get("used").await.unwrap().bounce_bytes, 2 << 20);
}

/// The operator may delete it; the file brings it back, empty.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_declared_domain_that_was_deleted_comes_back_at_the_next_reload() {
    let file = declared("disk-0", 1);
    let node = Node::told(&file).await;
    let before = node.get("disk-0").await.unwrap().uid;
    node.delete("disk-0", false).await.unwrap();
    refused(
        node.get("disk-0").await,
        Code::NotFound,
        Reason::NoSuchDomain,
    );
    let reloaded = node.reload(&file).await.unwrap();
    assert_eq!(reloaded.created_domains, ["domains/disk-0"]);
    assert_ne!(node.get("disk-0").await.unwrap().uid, before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_name_that_is_taken_is_kept_as_it_is_and_said() {
    let node = Node::told("").await;
    let taken = node.domain("d0").await;
    let reloaded = node.reload(&declared("d0", 1)).await.unwrap();
    assert!(
        reloaded.kept_domains[0]
            .reason
            .contains("was created by user"),
        "{reloaded:?}"
    );
    assert_eq!(node.get("d0").await.unwrap().uid, taken.uid);
    node.delete("d0", false).await.unwrap();
    let reloaded = node.reload(&declared("d0", 1)).await.unwrap();
    assert_eq!(reloaded.created_domains, ["domains/d0"]);
}
