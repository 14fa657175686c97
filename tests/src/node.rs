//! A real daemon, in a directory of its own.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use domaind_client::{Client, DomainId, RuntimeDir, v1};
use rustix::process::Signal;
use tempfile::TempDir;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

use crate::children;
use crate::refusal::{Refused, answer};
use crate::users::{CLIENT_GID, is_root};
use crate::wait::{self, DEADLINE};

/// A socket's path is short; `TMPDIR` may not be.
const SHORT: &str = "/tmp";

/// Has every daemon started in its poison mode.
const TEST_POISON: &str = "DOMAIND_TEST_POISON";

/// What a daemon in poison mode leaves in free memory, ROBUSTNESS.md 2.3.
pub const POISON: u8 = 0xa5;

/// How long a daemon may take to stop.
const STOP: Duration = Duration::from_secs(25);

/// One running `domaind`. Stopped, and its directory removed, on drop.
#[derive(Debug)]
pub struct Node {
    dir: TempDir,
    /// A command that starts it, and stays its process; none if empty.
    starter: Vec<String>,
    flags: Vec<String>,
    env: Vec<(String, String)>,
    child: Child,
    admin: Option<Client>,
}

/// Everything that the daemon counts, and that must come back to where it was
/// when whoever used it is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // as in `Info`
pub struct Counts {
    pub domains: u32,
    pub sessions: u32,
    pub streaming_mappings: u64,
    pub coherent_allocations: u64,
    pub memories: u64,
    pub region_bytes: u64,
    pub open_fds: u32,
}

impl Counts {
    /// The same while some client is still connected, which costs fds.
    #[must_use]
    pub fn but_fds(self) -> Counts {
        Counts {
            open_fds: 0,
            ..self
        }
    }
}

impl Node {
    /// A daemon with the defaults.
    pub async fn start() -> Node {
        Node::with(&[]).await
    }

    /// A daemon with these flags.
    pub async fn with(flags: &[&str]) -> Node {
        Node::configured(flags, &[]).await
    }

    /// A daemon with these flags and variables.
    ///
    /// # Panics
    /// Without a directory for temporary files.
    pub async fn configured(flags: &[&str], env: &[(&str, &str)]) -> Node {
        let dir = tempfile::Builder::new()
            .prefix("domaind-t")
            .tempdir_in(SHORT);
        Node::start_in(dir.expect("a temporary directory"), &[], flags, env).await
    }

    /// A daemon that other users may connect to; for tests that run as root.
    ///
    /// # Panics
    /// If the directory cannot be opened to others.
    pub async fn shared(flags: &[&str]) -> Node {
        let gid = format!("--server-client-gid={CLIENT_GID}");
        let flags: Vec<_> = flags.iter().copied().chain([gid.as_str()]).collect();
        Node::start_in(dir_for_all(), &[], &flags, &[]).await
    }

    /// A daemon with this configuration file. If root runs the tests, other users may
    /// connect to it.
    ///
    /// # Panics
    /// If the file cannot be written.
    pub async fn told(file: &str) -> Node {
        let dir = dir_for_all();
        fs::write(config_path(dir.path()), file).expect("written");
        let config = format!("--config={}", config_path(dir.path()).display());
        let gid = format!("--server-client-gid={CLIENT_GID}");
        let mut flags = vec![config.as_str()];
        if is_root() {
            flags.push(&gid);
        }
        Node::start_in(dir, &[], &flags, &[]).await
    }

    /// Changes the file of [`Node::told`], and has the daemon read it again.
    ///
    /// # Panics
    /// If the file cannot be written.
    pub async fn reload(&self, file: &str) -> Refused<v1::ReloadConfigResponse> {
        self.tell(file);
        let request = v1::ReloadConfigRequest {};
        answer(self.admin().admin().reload_config(request).await)
    }

    /// Changes the file of [`Node::told`], and no more.
    ///
    /// # Panics
    /// If the file cannot be written.
    pub fn tell(&self, file: &str) {
        fs::write(config_path(self.path()), file).expect("written");
    }

    /// SIGHUP.
    pub fn hang_up(&self) {
        children::signal(self.child.id(), Signal::HUP);
    }

    /// The audit lines so far: the fields of each.
    #[must_use]
    pub fn audit(&self) -> Vec<serde_json::Value> {
        let log = self.log();
        let lines = log
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok());
        let audits = lines.filter(|line: &serde_json::Value| line["target"] == "domaind::audit");
        audits.map(|line| line["fields"].clone()).collect()
    }

    /// A daemon that another command starts, and then becomes: `unshare` and
    /// the like. Its sockets are left as it makes them.
    ///
    /// # Panics
    /// If the directory cannot be opened to others.
    pub async fn started_by(starter: &[&str], flags: &[&str]) -> Node {
        Node::start_in(dir_for_all(), starter, flags, &[]).await
    }

    async fn start_in(
        dir: TempDir,
        starter: &[&str],
        flags: &[&str],
        env: &[(&str, &str)],
    ) -> Node {
        let starter: Vec<_> = starter.iter().map(|word| (*word).to_owned()).collect();
        let flags: Vec<_> = flags.iter().map(|flag| (*flag).to_owned()).collect();
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        let env: Vec<_> = env.iter().map(owned).collect();
        let child = serve(dir.path(), &starter, &flags, &env);
        let mut node = Node {
            dir,
            starter,
            flags,
            env,
            child,
            admin: None,
        };
        node.until_ready([0; 3]).await;
        node
    }

    /// Starts it again in the same directory, after [`Node::kill`] or
    /// [`Node::stop`].
    pub async fn restart(&mut self) {
        let stale = self.inodes();
        self.child = serve(self.dir.path(), &self.starter, &self.flags, &self.env);
        self.until_ready(stale).await;
    }

    /// What lies under the names of the three sockets; 0 for nothing.
    fn inodes(&self) -> [u64; 3] {
        let dir = self.runtime_dir();
        let names = [dir.api_socket(), dir.fd_socket(), dir.admin_socket()];
        names.map(|path| fs::metadata(path).map_or(0, |meta| meta.ino()))
    }

    /// Ready when all sockets are there, and are not those that a dead daemon
    /// has left. Asks over one connection, which stays: no other is ever in
    /// the counts.
    async fn until_ready(&mut self, stale: [u64; 3]) {
        let dir = self.runtime_dir();
        let until = Instant::now() + DEADLINE;
        let admin = loop {
            let pairs = self.inodes().into_iter().zip(stale);
            let are_there = pairs.fold(true, |all, (now, then)| all && now != 0 && now != then);
            if are_there && let Ok(admin) = Client::connect_admin(&dir).await {
                break admin;
            }
            let ended = self.child.try_wait().expect("a child can be waited for");
            assert!(ended.is_none(), "domaind ended: {ended:?}\n{}", self.log());
            assert!(Instant::now() < until, "domaind does not come up");
            tokio::time::sleep(Duration::from_millis(3)).await;
        };
        self.admin = Some(admin);
    }

    /// Process id of the daemon.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where its sockets are.
    ///
    /// # Panics
    /// If the temporary directory has too long a path.
    #[must_use]
    pub fn runtime_dir(&self) -> RuntimeDir {
        RuntimeDir::new(&self.path().join("run")).expect("a short path")
    }

    /// A directory for the test's own files, which goes with the node.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The control plane over the public socket.
    ///
    /// # Panics
    /// If it cannot be reached.
    pub async fn client(&self) -> Client {
        let client = Client::connect(&self.runtime_dir()).await;
        let client = client.expect("the public socket is there");
        greet(&client).await;
        client
    }

    /// Changes a domain.
    pub async fn update(&self, request: v1::UpdateDomainRequest) -> Refused<v1::Domain> {
        answer(self.admin().domains().update_domain(request).await)
    }

    /// The control plane over the operator's socket.
    ///
    /// # Panics
    /// If the daemon was stopped.
    #[must_use]
    pub fn admin(&self) -> Client {
        self.admin.clone().expect("the daemon runs")
    }

    /// The daemon as it sees itself.
    ///
    /// # Panics
    /// If it does not answer.
    pub async fn info(&self) -> v1::Info {
        let info = self.admin().admin().get_info(v1::GetInfoRequest {}).await;
        info.expect("GetInfo answers").into_inner()
    }

    /// Everything that is counted, now.
    pub async fn counts(&self) -> Counts {
        let info = self.info().await;
        Counts {
            domains: info.domains,
            sessions: info.sessions,
            streaming_mappings: info.streaming_mappings,
            coherent_allocations: info.coherent_allocations,
            memories: info.memories,
            region_bytes: info.region_bytes,
            open_fds: info.open_fds,
        }
    }

    /// Waits until the counts are what they were.
    pub async fn until_counts(&self, wanted: Counts) {
        wait::until_equal("the counts", wanted, || self.counts()).await;
    }

    /// Waits until all but the fds is what it was.
    pub async fn until_counts_but_fds(&self, wanted: Counts) {
        let look = async || self.counts().await.but_fds();
        wait::until_equal("the counts", wanted.but_fds(), look).await;
    }

    /// Creates a domain with small apertures: 16 MiB and 4 MiB.
    ///
    /// # Panics
    /// If it is refused.
    pub async fn domain(&self, id: &str) -> v1::Domain {
        self.create(id, spec(16 << 20, 4 << 20))
            .await
            .expect("created")
    }

    /// Creates a domain, over the operator's socket.
    pub async fn create(&self, id: &str, spec: v1::DomainSpec) -> Refused<v1::Domain> {
        let request = v1::CreateDomainRequest {
            domain_id: id.to_owned(),
            spec: Some(spec),
            ..Default::default()
        };
        answer(self.admin().domains().create_domain(request).await)
    }

    /// Deletes a domain.
    pub async fn delete(&self, id: &str, force: bool) -> Refused<v1::DeleteDomainResponse> {
        let request = v1::DeleteDomainRequest {
            name: name(id),
            force,
            ..Default::default()
        };
        answer(self.admin().domains().delete_domain(request).await)
    }

    /// One domain as it is.
    pub async fn get(&self, id: &str) -> Refused<v1::Domain> {
        let request = v1::GetDomainRequest { name: name(id) };
        answer(self.admin().domains().get_domain(request).await)
    }

    /// What a domain holds now, without the bytes of its page table: what
    /// that has once needed it keeps, to use it again.
    ///
    /// # Panics
    /// If there is no such domain.
    pub async fn usage(&self, id: &str) -> v1::DomainUsage {
        let domain = self.get(id).await.expect("it is there");
        v1::DomainUsage {
            table_bytes: 0,
            ..domain.usage.expect("usage is always set")
        }
    }

    /// What the page table of a domain needs now.
    ///
    /// # Panics
    /// If there is no such domain.
    pub async fn table_bytes(&self, id: &str) -> u64 {
        let domain = self.get(id).await.expect("it is there");
        domain.usage.expect("usage is always set").table_bytes
    }

    /// Waits until a domain holds exactly that.
    pub async fn until_usage(&self, id: &str, wanted: v1::DomainUsage) {
        wait::until_equal("the usage", wanted, || self.usage(id)).await;
    }

    /// All live mappings of a domain, page by page.
    ///
    /// # Panics
    /// If they cannot be listed.
    pub async fn mappings(&self, id: &str) -> Vec<v1::Mapping> {
        let mut request = v1::ListMappingsRequest {
            domain: name(id),
            ..Default::default()
        };
        let mut mappings = Vec::new();
        loop {
            let page = self.admin().mappings().list_mappings(request.clone()).await;
            let page = page.expect("ListMappings").into_inner();
            mappings.extend(page.mappings);
            if page.next_page_token.is_empty() {
                return mappings;
            }
            request.page_token = page.next_page_token;
        }
    }

    /// The attached sessions of a domain, at most 100.
    ///
    /// # Panics
    /// If they cannot be listed.
    pub async fn sessions(&self, id: &str) -> Vec<v1::Session> {
        let request = v1::ListSessionsRequest {
            domain: name(id),
            ..Default::default()
        };
        let page = self.admin().sessions().list_sessions(request).await;
        page.expect("ListSessions").into_inner().sessions
    }

    /// Ends a session.
    pub async fn evict(&self, session: &str) -> Refused<v1::EvictSessionResponse> {
        let request = v1::EvictSessionRequest {
            name: session.to_owned(),
            ..Default::default()
        };
        answer(self.admin().sessions().evict_session(request).await)
    }

    /// SIGTERM, and how it ended.
    pub fn stop(&mut self) -> ExitStatus {
        self.admin = None;
        children::signal(self.child.id(), Signal::TERM);
        children::end_of(&mut self.child, STOP)
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.admin = None;
        children::kill(&mut self.child);
    }

    /// What it has written to standard error so far.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(log_path(self.dir.path())).unwrap_or_default()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let skipped = log.lines().count().saturating_sub(40);
            eprintln!("-- end of the log of domaind {}:", self.pid());
            log.lines()
                .skip(skipped)
                .for_each(|line| eprintln!("{line}"));
        }
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            children::signal(self.child.id(), Signal::TERM);
            let until = Instant::now() + STOP;
            while Instant::now() < until && matches!(self.child.try_wait(), Ok(None)) {
                std::thread::sleep(Duration::from_millis(2));
            }
            children::kill(&mut self.child);
        }
    }
}

/// Makes one call: a connection is counted from when the daemon has accepted
/// it, which is later than when the client believes to be connected.
///
/// # Panics
/// If nobody answers.
pub async fn greet(client: &Client) {
    let request = HealthCheckRequest::default();
    let answer = HealthClient::new(client.channel()).check(request).await;
    answer.expect("the daemon is healthy");
}

/// `domaind` with an environment that says nothing about it.
#[must_use]
pub fn domaind() -> Command {
    without_settings(Command::new(children::program("domaind")))
}

/// Takes every variable away that daemon and command line would read.
#[must_use]
pub fn without_settings(mut command: Command) -> Command {
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("DOMAIND_") {
            command.env_remove(name);
        }
    }
    command
}

/// A directory that everybody may look into.
fn dir_for_all() -> TempDir {
    let dir = tempfile::Builder::new()
        .prefix("domaind-t")
        .tempdir_in(SHORT);
    let dir = dir.expect("a temporary directory");
    fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).expect("chmod");
    dir
}

fn serve(dir: &Path, starter: &[String], flags: &[String], env: &[(String, String)]) -> Child {
    let log = File::options()
        .create(true)
        .append(true)
        .open(log_path(dir));
    let mut command = match starter.split_first() {
        None => domaind(),
        Some((program, words)) => {
            let mut command = without_settings(Command::new(program));
            command.args(words).arg(children::program("domaind"));
            command
        }
    };
    command
        .arg("serve")
        .arg("--runtime-dir")
        .arg(dir.join("run"))
        .args(["--log-format", "json"])
        .args(flags)
        .envs(is_poisoned().then_some(("DOMAIND_POISON", "1")))
        .envs(env.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log.expect("a log file"))
        .spawn()
        .expect("domaind starts")
}

/// Whether every daemon of this run shall fill what it scrubs with
/// [`POISON`] instead of zeros: `DOMAIND_TEST_POISON=1`. Nothing that the API
/// promises to be zero may differ then.
#[must_use]
pub fn is_poisoned() -> bool {
    std::env::var_os(TEST_POISON).is_some_and(|value| value == "1")
}

/// What memory holds that is free and scrubbed, for those tests that look
/// where no mapping is.
#[must_use]
pub fn scrubbed() -> u8 {
    if is_poisoned() { POISON } else { 0 }
}

fn config_path(dir: &Path) -> PathBuf {
    dir.join("domaind.toml")
}

fn log_path(dir: &Path) -> PathBuf {
    dir.join("domaind.log")
}

/// `domains/{id}`.
#[must_use]
pub fn name(id: &str) -> String {
    format!("domains/{id}")
}

/// The id, checked.
///
/// # Panics
/// If it is none.
#[must_use]
pub fn domain_id(id: &str) -> DomainId {
    DomainId::new(id).expect("a good name")
}

/// A domain of these sizes, and defaults for the rest.
#[must_use]
pub fn spec(bounce_bytes: u64, coherent_bytes: u64) -> v1::DomainSpec {
    v1::DomainSpec {
        bounce_bytes: Some(bounce_bytes),
        coherent_bytes: Some(coherent_bytes),
        ..Default::default()
    }
}
