//! What `domainctl` does to the domain that a name says, and what it leaves
//! when it fails: the program itself, at a daemon inside of the test.

use std::fs::OpenOptions;
use std::path::Path;
use std::process::{Output, Stdio};

use domaind_client::RuntimeDir;
use domaind_server::{Config, Daemon};
use tempfile::TempDir;
use tokio::process::Command;

/// A daemon, and its runtime directory, which goes away with this.
struct Node {
    daemon: Daemon,
    dir: TempDir,
}

impl Node {
    async fn start() -> Node {
        let dir = TempDir::new().unwrap();
        let run = RuntimeDir::new(&run_dir(dir.path())).unwrap();
        let daemon = Daemon::start(Config::for_runtime_dir(run)).await.unwrap();
        Node { daemon, dir }
    }

    fn command(&self, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_domainctl"));
        command.args(line.split_whitespace());
        command.arg("--runtime-dir").arg(run_dir(self.dir.path()));
        command
    }

    async fn run(&self, line: &str) -> Output {
        self.command(line).output().await.unwrap()
    }

    /// What a command prints that must succeed.
    async fn ok(&self, line: &str) -> String {
        let output = self.run(line).await;
        assert!(output.status.success(), "{line}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// What a command says that must be refused as wrong usage.
    async fn wrong(&self, line: &str) -> String {
        let output = self.run(line).await;
        assert_eq!(output.status.code(), Some(2), "{line}: {output:?}");
        String::from_utf8(output.stderr).unwrap()
    }

    /// Domains that each have memory 1, mapped at 0x1000000.
    async fn with_mappings(domains: [&str; 2]) -> Node {
        let node = Node::start().await;
        for domain in domains {
            let small = "--bounce 0 --coherent 8KiB";
            node.ok(&format!("create domain {domain} {small}")).await;
            node.ok(&format!("create memory {domain} --size 8KiB"))
                .await;
            let map = "--memory 1 --length 4KiB --perm rw --iova 0x1000000";
            node.ok(&format!("map {domain} {map}")).await;
        }
        node
    }

    async fn mappings(&self, domain: &str) -> String {
        self.ok(&format!("get mappings {domain} -o name")).await
    }
}

fn run_dir(dir: &Path) -> std::path::PathBuf {
    dir.join("run")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_acts_in_its_own_domain_or_not_at_all() {
    let node = Node::with_mappings(["victim", "d1"]).await;
    let of_d1 = node.mappings("d1").await;
    assert_eq!(of_d1, "domains/d1/mappings/0x1000000-0x1000fff\n");
    for line in [
        format!("unmap victim {of_d1}"),
        format!("clear-map victim {of_d1}"),
        format!("lookup victim {of_d1}"),
        format!("get mappings victim --range {of_d1}"),
        "get mappings victim --memory domains/d1/memories/1".to_owned(),
        "map victim --memory domains/d1/memories/1 --length 4KiB --perm r".to_owned(),
        "delete memory victim domains/d1/memories/1".to_owned(),
    ] {
        let said = node.wrong(&line).await;
        assert!(said.contains("domains/victim"), "{line}: {said}");
        assert!(said.contains("domains/d1"), "{line}: {said}");
    }
    let map = "map --memory domains/d1/memories/1 --length 4KiB --perm r --iova 0x2000000";
    node.ok(map).await;

    // As xargs would.
    let of_d1 = node.mappings("d1").await;
    assert_eq!(of_d1.lines().count(), 2);
    let unmapped = node.ok(&format!("unmap {of_d1}")).await;
    assert_eq!(unmapped, "domains/d1 unmapped 2 mappings (8 KiB)\n");
    let memories = node.ok("get memories d1 -o name").await;
    let deleted = node.ok(&format!("delete memory {memories}")).await;
    assert_eq!(deleted, "domains/d1/memories/1 deleted\n");

    assert_eq!(node.mappings("d1").await, "");
    let of_victim = node.mappings("victim").await;
    assert_eq!(of_victim, "domains/victim/mappings/0x1000000-0x1000fff\n");
    assert!(
        node.wrong("unmap 0x1000000+4KiB")
            .await
            .contains("say in which domain")
    );
    node.daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_whose_id_cannot_be_printed_does_not_stay() {
    let node = Node::start().await;
    node.ok("create domain d0 --bounce 0 --coherent 8KiB").await;
    for format in ["table", "json", "yaml", "name"] {
        let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let create = format!("create memory d0 --size 4KiB -o {format}");
        let mut command = node.command(&create);
        // Not output(), which would lay a pipe over it.
        let child = command.stdout(full).stderr(Stdio::piped()).spawn();
        let output = child.unwrap().wait_with_output().await.unwrap();
        assert_eq!(output.status.code(), Some(1), "{format}: {output:?}");
        assert_eq!(node.ok("get memories d0 -o name").await, "", "{format}");
    }
    node.daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_of_a_memory_can_be_mapped_whatever_the_granule() {
    let node = Node::start().await;
    let create = "create domain d0 --granule 2MiB --bounce 0 --coherent 4MiB";
    node.ok(create).await;
    let created = node.ok("create memory d0 --size 1MiB").await;
    assert_eq!(created, "domains/d0/memories/1 created (2 MiB)\n");
    node.ok("map d0 --memory 1 --length 2MiB --perm rw").await;
    node.daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_overlap_in_a_table_file_says_how_entries_are_counted() {
    let node = Node::with_mappings(["d0", "d1"]).await;
    let entry = |iova: u64| format!("- {{iova: {iova:#x}, length: 4KiB, memoryId: 1, perm: r}}\n");
    let entries = [0x1000_0000, 0x2000_0000, 0x3000_0000, 0x3000_0000].map(entry);
    let table = node.dir.path().join("table.yaml");
    std::fs::write(&table, format!("entries:\n{}", entries.concat())).unwrap();
    let output = node
        .run(&format!("set-map d0 -f {}", table.display()))
        .await;
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("entry 3: "), "{said}");
    assert!(said.contains(" of entry 2 "), "{said}");
    assert!(said.ends_with("(entries are counted from 0)\n"), "{said}");
    node.daemon.stop().await;
}
