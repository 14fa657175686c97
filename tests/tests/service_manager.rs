//! The daemon under a service manager, which these tests play: they bind its
//! sockets and pass them, and hear what it tells.

use std::fs::{self, File};
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use domaind_client::{Client, RuntimeDir};
use domaind_tests::node::{greet, spec, without_settings};
use domaind_tests::{children, v1, wait};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType,
};
use rustix::process::Signal;
use tempfile::TempDir;

/// Nothing is said for so long when nothing is to be said.
const QUIET: Duration = Duration::from_millis(700);

/// A service manager with one service.
struct Manager {
    dir: TempDir,
    heard: UnixDatagram,
    address: String,
    child: Option<Child>,
}

impl Manager {
    /// One that is spoken to over a path.
    fn new() -> Manager {
        let dir = tempfile::Builder::new()
            .prefix("domaind-t")
            .tempdir_in("/tmp");
        let dir = dir.expect("a temporary directory");
        let path = dir.path().join("notify");
        let heard = UnixDatagram::bind(&path).expect("bound");
        let address = path.to_str().expect("text").to_owned();
        Manager::hearing(dir, heard, address)
    }

    /// One that is spoken to over a name that is in no file system.
    fn abstract_one() -> Manager {
        let dir = tempfile::Builder::new()
            .prefix("domaind-t")
            .tempdir_in("/tmp");
        let dir = dir.expect("a temporary directory");
        let name = dir.path().to_str().expect("text").to_owned();
        let address = SocketAddr::from_abstract_name(&name).expect("short");
        let heard = UnixDatagram::bind_addr(&address).expect("bound");
        Manager::hearing(dir, heard, format!("@{name}"))
    }

    fn hearing(dir: TempDir, heard: UnixDatagram, address: String) -> Manager {
        heard.set_read_timeout(Some(wait::DEADLINE)).expect("set");
        for name in ["public", "admin"] {
            fs::create_dir_all(dir.path().join("run").join(name)).expect("made");
        }
        let child = None;
        Manager {
            dir,
            heard,
            address,
            child,
        }
    }

    fn run(&self) -> RuntimeDir {
        RuntimeDir::new(&self.dir.path().join("run")).expect("short")
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// Starts the daemon with these sockets, which it finds from fd 3 on.
    fn start(&mut self, sockets: &[OwnedFd], names: &str, env: &[(&str, &str)]) {
        let count = sockets.len().to_string();
        let listening = [("LISTEN_FDS", count.as_str()), ("LISTEN_FDNAMES", names)];
        let env: Vec<_> = listening.iter().chain(env).copied().collect();
        self.start_as("LISTEN_PID=$$", sockets, &env);
    }

    /// The three standard streams carry the sockets to a shell, which puts them
    /// where they belong and becomes the daemon: so they have no other way out
    /// of this process, and `$$` is the daemon's pid.
    fn start_as(&mut self, listen_pid: &str, sockets: &[OwnedFd], env: &[(&str, &str)]) {
        assert!(sockets.len() <= 3);
        let script = format!(
            "exec 3<&0 4<&1 5<&2 </dev/null >/dev/null 2>>\"$1\"; shift; \
             {listen_pid} exec \"$@\" 6<&-"
        );
        let carried = |k: usize| match sockets.get(k) {
            Some(socket) => Stdio::from(socket.try_clone().expect("cloned")),
            None => Stdio::null(),
        };
        let child = without_settings(Command::new("sh"))
            .args(["-c", &script, "sh"])
            .arg(self.dir.path().join("log"))
            .arg(children::program("domaind"))
            .arg("serve")
            .arg("--runtime-dir")
            .arg(self.run().path())
            .env("NOTIFY_SOCKET", &self.address)
            .envs(env.iter().copied())
            .stdin(carried(0))
            .stdout(carried(1))
            .stderr(carried(2))
            .spawn()
            .expect("sh starts");
        self.child = Some(child);
    }

    fn pid(&self) -> u32 {
        self.child.as_ref().expect("started").id()
    }

    /// The next message.
    #[track_caller]
    fn next(&self) -> String {
        match self.hear() {
            Some(said) => said,
            None => panic!("nothing was said\n{}", self.log()),
        }
    }

    fn hear(&self) -> Option<String> {
        let mut bytes = [0; 4096];
        let len = self.heard.recv(&mut bytes).ok()?;
        Some(String::from_utf8(bytes[..len].to_vec()).expect("text"))
    }

    /// What is said until a message begins like that, which is the last of it.
    #[track_caller]
    fn until(&self, beginning: &str) -> Vec<String> {
        let mut all = vec![self.next()];
        while !all[all.len() - 1].starts_with(beginning) {
            all.push(self.next());
        }
        all
    }

    /// What is said in a while.
    fn meanwhile(&self, how_long: Duration) -> Vec<String> {
        let until = Instant::now() + how_long;
        let mut all = Vec::new();
        while let Some(left) = until
            .checked_duration_since(Instant::now())
            .filter(|d| !d.is_zero())
        {
            self.heard.set_read_timeout(Some(left)).expect("set");
            all.extend(self.hear());
        }
        self.heard
            .set_read_timeout(Some(wait::DEADLINE))
            .expect("set");
        all
    }

    fn stop(&mut self) -> ExitStatus {
        children::signal(self.pid(), Signal::TERM);
        self.end()
    }

    fn end(&mut self) -> ExitStatus {
        let mut child = self.child.take().expect("started");
        children::end_of(&mut child, Duration::from_secs(20))
    }

    /// Starts it and expects that it gives up at once; what it says.
    #[track_caller]
    fn refused(&mut self, sockets: &[OwnedFd], names: &str, env: &[(&str, &str)]) -> String {
        let before = self.log().len();
        self.start(sockets, names, env);
        let status = self.end();
        let said = self.log().split_off(before);
        assert!(!status.success(), "it started: {said}");
        assert_eq!(
            self.meanwhile(Duration::from_millis(1)),
            Vec::<String>::new()
        );
        said
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("-- log of domaind:\n{}", self.log());
        }
        if let Some(child) = &mut self.child {
            children::signal(child.id(), Signal::CONT);
            children::kill(child);
        }
    }
}

fn socket(kind: SocketType) -> OwnedFd {
    rustix::net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)
        .expect("a socket")
}

fn listener(path: &Path, kind: SocketType) -> OwnedFd {
    let socket = bound(path, kind);
    rustix::net::listen(&socket, 16).expect("listening");
    socket
}

fn bound(path: &Path, kind: SocketType) -> OwnedFd {
    let socket = socket(kind);
    let address = SocketAddrUnix::new(path).expect("short");
    rustix::net::bind(&socket, &address).expect("bound");
    socket
}

/// The three, as two socket units would bind them.
fn all_three(run: &RuntimeDir) -> [OwnedFd; 3] {
    [
        listener(&run.api_socket(), SocketType::STREAM),
        listener(&run.fd_socket(), SocketType::SEQPACKET),
        listener(&run.admin_socket(), SocketType::STREAM),
    ]
}

fn inodes(run: &RuntimeDir) -> [u64; 3] {
    let sockets: [PathBuf; 3] = [run.api_socket(), run.fd_socket(), run.admin_socket()];
    sockets.map(|path| fs::symlink_metadata(path).expect("it is there").ino())
}

fn attach(run: &RuntimeDir) {
    let client = socket(SocketType::SEQPACKET);
    let address = SocketAddrUnix::new(run.fd_socket()).expect("short");
    rustix::net::connect(&client, &address).expect("fd.sock listens");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn ready_is_told_when_all_is_served_and_stopping_before_it_goes() {
    let mut manager = Manager::new();
    manager.start(&[], "", &[]);
    assert_eq!(manager.next(), "READY=1");
    let run = manager.run();
    UnixStream::connect(run.api_socket()).expect("api.sock listens");
    attach(&run);
    let admin = Client::connect_admin(&run)
        .await
        .expect("admin.sock listens");
    assert_eq!(manager.next(), "STATUS=Serving 0 domains, 0 sessions");

    let request = v1::CreateDomainRequest {
        domain_id: "d0".into(),
        spec: Some(spec(1 << 20, 1 << 20)),
        ..Default::default()
    };
    admin
        .domains()
        .create_domain(request)
        .await
        .expect("created");
    assert_eq!(manager.next(), "STATUS=Serving 1 domains, 0 sessions");

    drop(admin);
    assert!(manager.stop().success());
    assert_eq!(manager.next(), "STOPPING=1\nSTATUS=Stopping");
    assert_eq!(
        manager.meanwhile(Duration::from_millis(1)),
        Vec::<String>::new()
    );
}

#[test]
fn a_manager_that_is_in_no_file_system_hears_the_same() {
    let mut manager = Manager::abstract_one();
    manager.start(&[], "", &[]);
    assert_eq!(manager.next(), "READY=1");
    assert!(manager.stop().success());
    manager.until("STOPPING=1");
}

#[test]
fn a_watchdog_hears_two_beats_each_time_and_none_of_one_that_is_stuck() {
    let mut manager = Manager::new();
    let limit = Duration::from_millis(400);
    manager.start(&[], "", &[("WATCHDOG_USEC", "400000")]);
    manager.until("WATCHDOG=1");
    let begun = Instant::now();
    for _ in 0..10 {
        manager.until("WATCHDOG=1");
    }
    let took = begun.elapsed();
    assert!(took >= limit * 9 / 2, "{took:?}: more often than was asked");

    children::stop(manager.pid());
    manager.meanwhile(Duration::from_millis(1));
    assert_eq!(manager.meanwhile(limit * 3), Vec::<String>::new());
    children::signal(manager.pid(), Signal::CONT);
    manager.until("WATCHDOG=1");
    assert!(manager.stop().success());
}

#[test]
fn a_watchdog_that_is_meant_for_somebody_else_hears_nothing() {
    let mut manager = Manager::new();
    let env = [("WATCHDOG_USEC", "200000"), ("WATCHDOG_PID", "1")];
    manager.start(&[], "", &env);
    manager.until("READY=1");
    let said = manager.meanwhile(QUIET);
    assert_eq!(said, ["STATUS=Serving 0 domains, 0 sessions"]);
    assert!(manager.stop().success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn sockets_that_are_passed_are_served_and_outlive_the_daemon() {
    let mut manager = Manager::new();
    let run = manager.run();
    let sockets = all_three(&run);
    let before = inodes(&run);
    // Waits in the backlog, and has asked already.
    let mut early = UnixStream::connect(run.api_socket()).expect("it listens");
    early
        .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
        .expect("written");
    for _ in 0..2 {
        manager.start(&sockets, "public:public:admin", &[]);
        manager.until("READY=1");
        assert_eq!(inodes(&run), before);
        greet(&Client::connect(&run).await.expect("public")).await;
        greet(&Client::connect_admin(&run).await.expect("admin")).await;
        attach(&run);
        // They end with this program: no child of it would have them.
        for fd in 3..6 {
            let info = fs::read_to_string(format!("/proc/{}/fdinfo/{fd}", manager.pid()));
            let info = info.expect("it has it");
            let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
            let flags = u32::from_str_radix(flags.expect("flags").trim(), 8).expect("octal");
            assert_ne!(flags & 0o2_000_000, 0, "fd {fd} is not close-on-exec");
        }
        assert!(manager.stop().success());
        assert_eq!(
            inodes(&run),
            before,
            "a name that is not the daemon's is gone"
        );
        // Nobody is turned away between two daemons.
        UnixStream::connect(run.api_socket()).expect("it listens still");
    }
    let mut answer = [0; 9];
    early.read_exact(&mut answer).expect("it was served");
    assert_eq!(answer[3], 4, "no SETTINGS");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_is_not_passed_the_daemon_binds_itself() {
    let mut manager = Manager::new();
    let run = manager.run();
    let admin = [listener(&run.admin_socket(), SocketType::STREAM)];
    manager.start(&admin, "admin", &[]);
    manager.until("READY=1");
    greet(&Client::connect(&run).await.expect("public")).await;
    greet(&Client::connect_admin(&run).await.expect("admin")).await;
    assert!(manager.stop().success());
    assert!(run.admin_socket().exists() && !run.api_socket().exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn sockets_for_another_process_are_left_alone() {
    for listen_pid in ["LISTEN_PID=1", "LISTEN_PID=", ""] {
        let mut manager = Manager::new();
        let run = manager.run();
        let sockets = all_three(&run);
        let before = inodes(&run);
        let env = [
            ("LISTEN_FDS", "3"),
            ("LISTEN_FDNAMES", "public:public:admin"),
        ];
        manager.start_as(listen_pid, &sockets, &env);
        manager.until("READY=1");
        let after = inodes(&run);
        assert!(before.iter().zip(after).all(|(then, now)| *then != now));
        greet(&Client::connect(&run).await.expect("public")).await;
        assert!(manager.stop().success());
    }
}

#[test]
fn sockets_that_the_daemon_cannot_place_are_refused_at_the_start_by_their_names() {
    let mut manager = Manager::new();
    let run = manager.run();
    let elsewhere = manager.dir.path().join("elsewhere.sock");
    let stream = || socket(SocketType::STREAM);
    let there = listener(&elsewhere, SocketType::STREAM);
    let udp = rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None).expect("a socket");
    let file = OwnedFd::from(File::open("/dev/null").expect("it is there"));
    let deaf = bound(&run.admin_socket(), SocketType::STREAM);
    let api = listener(&run.api_socket(), SocketType::STREAM);
    let cases: [(&[OwnedFd], &str, &[&str]); 9] = [
        (&[stream()], "metrics", &["\"metrics\"", "socket 3"]),
        (&[stream()], "", &["says 1", "names 0"]),
        (&[stream()], "public:admin", &["says 1", "names 2"]),
        (&[udp], "public", &["fd 3", "\"public\""]),
        (&[file], "admin", &["fd 3", "\"admin\""]),
        (
            &[socket(SocketType::SEQPACKET)],
            "admin",
            &["\"admin\"", "stream"],
        ),
        (&[there], "public", &["elsewhere.sock", "public/api.sock"]),
        (&[deaf], "admin", &["admin/admin.sock", "does not listen"]),
        (
            &[api, stream()],
            "public:public",
            &["api.sock", "second time", "fd 4"],
        ),
    ];
    for (sockets, names, expected) in cases {
        let said = manager.refused(sockets, names, &[]);
        assert!(
            expected.iter().all(|part| said.contains(part)),
            "{names}: {said}"
        );
    }
    let said = manager.refused(&[], "a:b:c:d", &[("LISTEN_FDS", "4")]);
    assert!(said.contains('4') && said.contains("a:b:c:d"), "{said}");
}

#[test]
fn a_manager_that_cannot_be_told_is_refused_at_the_start() {
    let mut manager = Manager::new();
    let said = manager.refused(&[], "", &[("NOTIFY_SOCKET", "nowhere")]);
    assert!(
        said.contains("NOTIFY_SOCKET") && said.contains("nowhere"),
        "{said}"
    );
    let said = manager.refused(&[], "", &[("WATCHDOG_USEC", "soon")]);
    assert!(
        said.contains("WATCHDOG_USEC") && said.contains("soon"),
        "{said}"
    );
}

fn send_fd(to: &UnixStream) -> rustix::io::Result<usize> {
    let fds = [to.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    rustix::net::sendmsg(to, &[IoSlice::new(b"P")], &mut control, SendFlags::NOSIGNAL)
}

/// Where the kernel lets a socket refuse them; one that the daemon bound itself
/// tells whether it does.
#[test]
fn nobody_can_send_fds_to_a_socket_that_was_passed_any_more_than_to_one_of_its_own() {
    let mut manager = Manager::new();
    let run = manager.run();
    let passed = listener(&run.api_socket(), SocketType::STREAM);
    let early = UnixStream::connect(run.api_socket()).expect("it listens");
    manager.start(&[passed], "public", &[]);
    manager.until("READY=1");
    let own = send_fd(&UnixStream::connect(run.admin_socket()).expect("admin"));
    let late = UnixStream::connect(run.api_socket()).expect("public");
    assert_eq!(send_fd(&late), own);
    if own.is_err() {
        // It is accepted some time after READY.
        wait::until("a connection that waited refuses fds, too", || {
            send_fd(&early) == own
        });
    }
    assert!(manager.stop().success());
}
