//! A client process that obeys its test: it can be killed, and run as
//! somebody else.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::time::Duration;

use domaind_proto::v1;
use serde_json::Value;

use crate::children::{self, program, program_for_all};
use crate::node::{Node, without_settings};
use crate::refusal::Refused;
use crate::script::{Ask, Bytes, Reply};
use crate::users::User;

/// How long an actor may take for one thing.
const LIMIT: Duration = Duration::from_secs(40);

/// A running client process. Killed on drop.
#[derive(Debug)]
pub struct Actor {
    child: Child,
    stdin: Option<ChildStdin>,
    replies: Receiver<Reply>,
}

/// A mapping or an allocation, by its parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Where it begins.
    pub iova: u64,
    /// Its name.
    pub id: u64,
}

impl Actor {
    /// Starts one for a daemon, as the user of the test.
    #[must_use]
    pub fn start(node: &Node) -> Actor {
        Actor::spawn(node, Command::new(program("actor")))
    }

    /// Starts one as somebody else, which only root can.
    ///
    /// # Panics
    /// If the program cannot be put where the other user can run it.
    #[must_use]
    pub fn start_as(node: &Node, user: User) -> Actor {
        let mut command = Command::new(program_for_all(node.path(), "actor"));
        command.uid(user.uid).gid(user.gid);
        Actor::spawn(node, command)
    }

    fn spawn(node: &Node, command: Command) -> Actor {
        let mut command = without_settings(command);
        command.arg(node.runtime_dir().path()).current_dir("/");
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = children::spawn(&mut command);
        let stdin = child.stdin.take();
        let stdout = child.stdout.take().expect("a pipe");
        let (sender, replies) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let reply = serde_json::from_str(&line)
                    .unwrap_or_else(|error| Reply::Failed(format!("{error}: {line}")));
                if sender.send(reply).is_err() {
                    return;
                }
            }
        });
        Actor {
            child,
            stdin,
            replies,
        }
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Says what to do, and does not wait.
    ///
    /// # Panics
    /// If it is gone.
    pub fn begin(&mut self, ask: &Ask) {
        let line = serde_json::to_string(ask).expect("JSON");
        let stdin = self.stdin.as_mut().expect("not killed yet");
        writeln!(stdin, "{line}").expect("the actor listens");
    }

    /// What came of what was begun first.
    ///
    /// # Panics
    /// If nothing comes, or something went wrong that is no refusal.
    #[track_caller]
    pub fn finish(&mut self) -> Refused<Value> {
        match self.reply() {
            Reply::Done(value) => Ok(value),
            Reply::Refused(refusal) => Err(refusal),
            Reply::Failed(text) => panic!("actor {}: {text}", self.pid()),
        }
    }

    /// What came of it, if it is done by now.
    ///
    /// # Panics
    /// If the actor is gone, or something went wrong that is no refusal.
    #[track_caller]
    pub fn poll(&mut self) -> Option<Refused<Value>> {
        match self.replies.try_recv() {
            Ok(Reply::Done(value)) => Some(Ok(value)),
            Ok(Reply::Refused(refusal)) => Some(Err(refusal)),
            Ok(Reply::Failed(text)) => panic!("actor {}: {text}", self.pid()),
            Err(TryRecvError::Empty) => None,
            Err(error) => panic!("actor {} says nothing: {error}", self.pid()),
        }
    }

    /// The same, whatever it is.
    ///
    /// # Panics
    /// If nothing comes.
    #[track_caller]
    pub fn reply(&mut self) -> Reply {
        match self.replies.recv_timeout(LIMIT) {
            Ok(reply) => reply,
            Err(error) => panic!("actor {} says nothing: {error}", self.pid()),
        }
    }

    /// Does one thing that must fail on the actor's own side; what it says.
    ///
    /// # Panics
    /// If it is done, or refused by the daemon.
    #[track_caller]
    pub fn fails(&mut self, ask: &Ask) -> String {
        self.begin(ask);
        match self.reply() {
            Reply::Failed(text) => text,
            other => panic!("{ask:?}: {other:?}"),
        }
    }

    /// Does one thing.
    #[track_caller]
    pub fn ask(&mut self, ask: &Ask) -> Refused<Value> {
        self.begin(ask);
        self.finish()
    }

    /// Does one thing, which must succeed.
    ///
    /// # Panics
    /// If it is refused.
    #[track_caller]
    pub fn must(&mut self, ask: &Ask) -> Value {
        match self.ask(ask) {
            Ok(value) => value,
            Err(refusal) => panic!("{ask:?}: {refusal:?}"),
        }
    }

    /// Creates a domain of its user's.
    #[track_caller]
    pub fn create(&mut self, domain: &str) {
        let domain = domain.to_owned();
        self.must(&Ask::Create { domain });
    }

    /// Attaches read-write; the session's name.
    ///
    /// # Panics
    /// If it is refused.
    #[track_caller]
    pub fn attach(&mut self, domain: &str, role: v1::Role) -> String {
        let attached = self.must(&Ask::Attach {
            domain: domain.to_owned(),
            role,
            access: v1::Access::ReadWrite,
        });
        text(&attached["session"])
    }

    /// Starts one that is attached as driver.
    #[must_use]
    pub fn driver(node: &Node, domain: &str) -> Actor {
        let mut actor = Actor::start(node);
        actor.attach(domain, v1::Role::Driver);
        actor
    }

    /// Starts one that is attached as device.
    #[must_use]
    pub fn device(node: &Node, domain: &str) -> Actor {
        let mut actor = Actor::start(node);
        actor.attach(domain, v1::Role::Device);
        actor
    }

    /// Makes a buffer; its memory id.
    #[track_caller]
    pub fn buffer(&mut self, len: u64) -> u64 {
        number(&self.must(&Ask::Buffer { len })["memory"])
    }

    /// Fills a buffer.
    #[track_caller]
    pub fn fill(&mut self, memory: u64, offset: u64, bytes: impl Into<Bytes>) {
        let bytes = bytes.into();
        self.must(&Ask::Fill {
            memory,
            offset,
            bytes,
        });
    }

    /// A buffer holds these bytes.
    ///
    /// # Panics
    /// If it does not.
    #[track_caller]
    pub fn assert_holds(&mut self, memory: u64, offset: u64, bytes: impl Into<Bytes>) {
        let bytes = bytes.into();
        let differs = self.must(&Ask::Compare {
            memory,
            offset,
            bytes: bytes.clone(),
        });
        assert_eq!(differs, Value::Null, "{bytes:?} at {offset} of {memory}");
    }

    /// Maps a buffer.
    #[track_caller]
    pub fn map(&mut self, memory: u64, offset: u64, len: u64, direction: v1::Direction) -> Place {
        self.map_many(memory, offset, len, direction, 1)[0]
    }

    /// Maps the same buffer several times.
    #[track_caller]
    pub fn map_many(
        &mut self,
        memory: u64,
        offset: u64,
        len: u64,
        direction: v1::Direction,
        count: usize,
    ) -> Vec<Place> {
        let mapped = self.must(&Ask::Map {
            memory,
            offset,
            len,
            direction,
            count,
        });
        list(&mapped).iter().map(place).collect()
    }

    /// Unmaps; how many bytes flowed back.
    #[track_caller]
    pub fn unmap(&mut self, place: Place, written: Option<u64>) -> u64 {
        let Place { iova, id } = place;
        number(&self.must(&Ask::Unmap { iova, id, written }))
    }

    /// Leases bounce memory.
    #[track_caller]
    pub fn lease(&mut self, len: u64) -> Place {
        place(&self.must(&Ask::Lease { len }))
    }

    /// Allocates coherent memory.
    #[track_caller]
    pub fn alloc(&mut self, len: u64, persistent: bool) -> Place {
        place(&self.must(&Ask::Alloc { len, persistent }))
    }

    /// Writes the domain's memory.
    #[track_caller]
    pub fn write(&mut self, iova: u64, bytes: impl Into<Bytes>) {
        let bytes = bytes.into();
        self.must(&Ask::Write { iova, bytes });
    }

    /// The domain's memory holds these bytes.
    ///
    /// # Panics
    /// If it does not.
    #[track_caller]
    pub fn assert_sees(&mut self, iova: u64, bytes: impl Into<Bytes>) {
        let bytes = bytes.into();
        let differs = self.must(&Ask::See {
            iova,
            bytes: bytes.clone(),
        });
        assert_eq!(differs, Value::Null, "{bytes:?} at {iova:#x}");
    }

    /// Nothing of the domain's memory holds these bytes.
    ///
    /// # Panics
    /// If something does.
    #[track_caller]
    pub fn assert_never_sees(&mut self, bytes: impl Into<Bytes>) {
        let bytes = bytes.into();
        let found = self.must(&Ask::Search {
            bytes: bytes.clone(),
        });
        assert_eq!(found, Value::Null, "{bytes:?} is to be seen at");
    }

    /// How the session ended; waits for it.
    #[track_caller]
    pub fn end_reason(&mut self) -> String {
        text(&self.must(&Ask::Ended)["reason"])
    }

    /// SIGKILL, and wait for the corpse. What it started lives on.
    pub fn kill(&mut self) {
        children::kill(&mut self.child);
    }
}

impl Drop for Actor {
    fn drop(&mut self) {
        // Its children end when nobody can ask them any more.
        self.stdin = None;
        self.kill();
    }
}

/// A number of a reply.
///
/// # Panics
/// If it is none.
#[must_use]
#[track_caller]
pub fn number(value: &Value) -> u64 {
    value
        .as_u64()
        .unwrap_or_else(|| panic!("{value} is no number"))
}

/// A text of a reply.
///
/// # Panics
/// If it is none.
#[must_use]
#[track_caller]
pub fn text(value: &Value) -> String {
    let text = value
        .as_str()
        .unwrap_or_else(|| panic!("{value} is no text"));
    text.to_owned()
}

/// A list of a reply.
///
/// # Panics
/// If it is none.
#[must_use]
#[track_caller]
pub fn list(value: &Value) -> &[Value] {
    value
        .as_array()
        .unwrap_or_else(|| panic!("{value} is no list"))
}

fn place(value: &Value) -> Place {
    Place {
        iova: number(&value["iova"]),
        id: number(&value["id"]),
    }
}
