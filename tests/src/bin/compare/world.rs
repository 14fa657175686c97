//! A daemon of our own, processes that attend its domains, and a plain socket
//! beside them.
//!
//! What goes through a daemon is slow against the clock and wakes other
//! threads. So a turn is the median of a few single calls, each timed by
//! itself, and the floor is the round trip of a small message between two
//! processes that block on a Unix socket.

use std::env;
use std::future::Future;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use domaind_client::{
    Access, Client, CoherentSpec, DirectMapping, MemoryId, Role, RuntimeDir, Session,
    SetMapOptions, v1,
};
use domaind_tests::build;
use domaind_tests::children;
use domaind_tests::files::good_memfd;
use domaind_tests::node::{Node, domain_id, spec};
use domaind_tests::users::{CLIENT_GID, is_root};
use tokio::runtime::{Builder, Runtime};

use crate::attend::{Attendance, THERE};
use crate::clock::median;
use crate::peers::{Mapping, PAGE};
use crate::random::Random;
use crate::rounds::{Contender, Role as Part};

/// Calls of one turn.
pub(crate) const CALLS: usize = 5;
/// Bytes of a message and of its answer.
pub(crate) const MESSAGE_BYTES: usize = 64;
/// Where direct mappings begin: above all apertures.
const DIRECT_BASE: u64 = 1 << 32;

/// A daemon and a client. All of the client's work is done on the thread that
/// waits for it, as in a process that has nothing else to do.
pub(crate) struct World {
    runtime: Runtime,
    client: Client,
    node: Option<Node>,
}

impl World {
    pub(crate) fn start() -> io::Result<World> {
        World::with(Node::start())
    }

    /// One that other users may connect to, if there can be any.
    pub(crate) fn shared() -> io::Result<World> {
        match is_root() {
            true => World::with(Node::shared(&[])),
            false => World::start(),
        }
    }

    fn with(node: impl Future<Output = Node>) -> io::Result<World> {
        build::domaind().map_err(|error| io::Error::other(format!("{error:#}")))?;
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let (node, client) = runtime.block_on(async {
            let node = node.await;
            let client = node.client().await;
            (node, client)
        });
        Ok(World {
            runtime,
            client,
            node: Some(node),
        })
    }

    pub(crate) fn run<F: Future>(&self, future: F) -> F::Output {
        self.runtime.block_on(future)
    }

    fn node(&self) -> &Node {
        self.node.as_ref().expect("it runs until the drop")
    }

    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    /// Another connection.
    pub(crate) async fn connect(&self) -> Client {
        let connected = Client::connect(&self.runtime_dir()).await;
        connected.expect("the public socket is there")
    }

    pub(crate) fn daemon_pid(&self) -> u32 {
        self.node().pid()
    }

    /// Bytes of regions, as the daemon counts them.
    pub(crate) fn region_bytes(&self) -> u64 {
        self.run(self.node().info()).region_bytes
    }

    /// Where files may be made that go with the daemon.
    pub(crate) fn path(&self) -> &Path {
        self.node().path()
    }

    /// So many domains with the smallest apertures.
    pub(crate) fn small_domains(&self, prefix: &str, count: u32) {
        for number in 0..count {
            let id = format!("{prefix}-{number}");
            let created = self.run(self.node().create(&id, least_spec()));
            created.expect("created");
        }
    }

    /// A driver in this process, and in a domain of its own.
    pub(crate) fn driver(&self, domain: &str) -> Session {
        self.run(self.node().domain(domain));
        self.run(self.attach(domain, Role::Driver))
    }

    /// The same, with a bounce aperture of so many bytes.
    pub(crate) fn driver_in(&self, domain: &str, bounce_bytes: u64) -> Session {
        let created = self.run(self.node().create(domain, spec(bounce_bytes, 0)));
        created.expect("created");
        self.run(self.attach(domain, Role::Driver))
    }

    pub(crate) async fn attach(&self, domain: &str, role: Role) -> Session {
        let domain = domain_id(domain);
        let attached = self.client.attach(&domain, role, Access::ReadWrite).await;
        attached.expect("attached")
    }

    /// Fills the direct table with so many entries, and gives them.
    pub(crate) fn set_map(&self, driver: &Session, entries: u64) -> Vec<Mapping> {
        let mappings = scattered(entries);
        // Its pages are never touched, and so never there.
        let memory = driver.register(good_memfd(entries * PAGE), true);
        let memory = self.run(memory).expect("registered").id();
        let table: Vec<_> = mappings
            .iter()
            .map(|mapping| direct(mapping, memory))
            .collect();
        let set = driver.stream_set_map(table, SetMapOptions::default());
        self.run(set).expect("a good table");
        mappings
    }

    /// So many processes that attend in the same way, all of them there.
    pub(crate) fn attendants(&self, attendance: &Attendance, count: usize) -> Vec<Attendant> {
        // All at once: each takes its time to start.
        let mut all: Vec<_> = (0..count).map(|_| Attendant::start(attendance)).collect();
        all.iter_mut().for_each(Attendant::wait_until_there);
        all
    }

    /// One that is there, and somebody else, if so wished.
    pub(crate) fn attendant_as(&self, attendance: &Attendance, uid: Option<u32>) -> Attendant {
        let mut one = match uid {
            None => Attendant::start(attendance),
            Some(uid) => {
                let program = children::program_for_all(self.path(), "compare");
                let mut command = Command::new(program);
                command.uid(uid).gid(CLIENT_GID).current_dir("/");
                Attendant::start_by(command, attendance)
            }
        };
        one.wait_until_there();
        one
    }

    pub(crate) fn runtime_dir(&self) -> RuntimeDir {
        self.node().runtime_dir()
    }

    /// A plain socket to a process that answers.
    pub(crate) fn echo(&self) -> io::Result<Echo> {
        let path = self.node().path().join("echo");
        let listener = UnixListener::bind(&path)?;
        let answers = Attendant::start(&Attendance::Echo { path });
        let (socket, _) = listener.accept()?;
        Ok(Echo {
            socket,
            _answers: answers,
        })
    }
}

impl Drop for World {
    /// The daemon says goodbye to connections, and waits for their answers.
    fn drop(&mut self) {
        let node = self.node.take();
        let stopped = async move { tokio::task::spawn_blocking(move || drop(node)).await };
        let _ = self.runtime.block_on(stopped);
    }
}

/// The other end of a plain socket.
pub(crate) struct Echo {
    socket: UnixStream,
    _answers: Attendant,
}

impl Echo {
    fn round_trip(&mut self) -> Duration {
        let mut message = [1; MESSAGE_BYTES];
        let start = Instant::now();
        self.socket.write_all(&message).expect("it listens");
        self.socket.read_exact(&mut message).expect("it answers");
        start.elapsed()
    }

    /// The floor of whatever needs another process.
    pub(crate) fn floor(&mut self) -> Contender<'_> {
        Contender::new(Part::Floor, "socket round trip", move || {
            typical(|| self.round_trip())
        })
    }
}

/// A process that ends with this.
pub(crate) struct Attendant(Child);

impl Attendant {
    fn start(attendance: &Attendance) -> Attendant {
        let program = env::current_exe().expect("a process knows its program");
        Attendant::start_by(Command::new(program), attendance)
    }

    fn start_by(mut command: Command, attendance: &Attendance) -> Attendant {
        let child = command
            .args(["--attend", &attendance.to_json()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        Attendant(child.expect("this program starts"))
    }

    fn wait_until_there(&mut self) {
        let stdout = self.0.stdout.as_mut().expect("it is piped");
        let mut line = String::new();
        let read = BufReader::new(stdout).read_line(&mut line);
        assert_eq!((read.ok(), line.as_str()), (Some(THERE.len()), THERE));
    }
}

impl Drop for Attendant {
    fn drop(&mut self) {
        // It ends with its input.
        self.0.stdin = None;
        let _ = self.0.wait();
    }
}

/// The median of one turn, in nanoseconds.
pub(crate) fn typical(mut call: impl FnMut() -> Duration) -> f64 {
    let calls = (0..CALLS).map(|_| call().as_secs_f64() * 1e9);
    median(calls.collect()).expect("there are calls")
}

/// Allocates and frees a page; what each took.
pub(crate) async fn alloc_free(driver: &Session) -> (Duration, Duration) {
    let start = Instant::now();
    let coherent = driver.alloc_coherent(CoherentSpec::of(PAGE)).await;
    let alloc = start.elapsed();
    let coherent = coherent.expect("there is room");
    let start = Instant::now();
    coherent.free().await.expect("freed");
    (alloc, start.elapsed())
}

/// A domain with the smallest apertures.
pub(crate) fn least_spec() -> v1::DomainSpec {
    spec(2 * PAGE, 2 * PAGE)
}

/// Pages of one memory in any order, with holes between them.
pub(crate) fn scattered(entries: u64) -> Vec<Mapping> {
    let mut pages: Vec<u64> = (0..entries).collect();
    Random::stream(40).shuffle(&mut pages);
    let starts = (0..).map(|place| DIRECT_BASE + place * 2 * PAGE);
    let mapping = |(start, page)| Mapping {
        start,
        len_bytes: PAGE,
        target: page * PAGE,
    };
    starts.zip(pages).map(mapping).collect()
}

/// The mapping in a direct table.
pub(crate) fn direct(mapping: &Mapping, memory: MemoryId) -> DirectMapping {
    let entry = mapping.entry();
    DirectMapping {
        range: entry.range,
        memory,
        offset: mapping.target,
        perm: entry.perm,
    }
}
