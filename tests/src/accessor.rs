//! A process with the client library whose pins its test holds, and one that
//! leaves what it was given to somebody else.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::children::{self, program};
use crate::node::{Node, without_settings};

/// How long it may take for one thing.
const LIMIT: Duration = Duration::from_secs(40);

/// What it shall do.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Say {
    /// Attach with the client library as device -> `session`. Comes first.
    Attach {
        /// Its id.
        domain: String,
    },
    /// Attach by hand, give a child the bounce region to map, and go on
    /// without being asked any more -> `{child, session}`. Comes instead. The
    /// child says `"holds"`, and, when its parent has died and it has sent Ack
    /// and Detach in its name, `"spoke"`.
    Leave {
        /// Its id.
        domain: String,
    },
    /// Attach by hand and send the bounce region to this datagram socket ->
    /// `session`. Comes instead.
    Post {
        /// Its id.
        domain: String,
        /// Where somebody is bound.
        to: String,
    },
    /// Pin, for the asks that follow -> the view.
    Pin,
    /// Let go.
    Unpin,
    /// Open the memory that a range leads to.
    Open {
        /// First address.
        start: u64,
        /// How many bytes.
        len: u64,
    },
    /// Read under the pin, or a short one -> the bytes.
    Read {
        /// First address.
        iova: u64,
        /// How many.
        len: usize,
    },
    /// Wait for the session's end -> the reason.
    Ended,
    /// Detach in order.
    Detach,
}

/// How it went.
pub type Said = Result<Value, String>;

/// A running one. Killed on drop.
#[derive(Debug)]
pub struct Accessor {
    child: Child,
    stdin: ChildStdin,
    said: Receiver<Said>,
}

impl Accessor {
    /// Starts one.
    ///
    /// # Panics
    /// If it does not start.
    #[must_use]
    pub fn start(node: &Node) -> Accessor {
        Accessor::start_at(node.runtime_dir().path())
    }

    fn start_at(dir: &Path) -> Accessor {
        let mut command = without_settings(Command::new(program("accessor")));
        command
            .arg(dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = children::spawn(&mut command);
        let stdin = child.stdin.take().expect("a pipe");
        let stdout = child.stdout.take().expect("a pipe");
        let (sender, said) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let reply = serde_json::from_str(&line)
                    .unwrap_or_else(|error| Err(format!("{error}: {line}")));
                if sender.send(reply).is_err() {
                    return;
                }
            }
        });
        Accessor { child, stdin, said }
    }

    /// One that is attached, and its session.
    #[must_use]
    #[track_caller]
    pub fn device(node: &Node, domain: &str) -> (Accessor, String) {
        let mut accessor = Accessor::start(node);
        let domain = domain.to_owned();
        let session = accessor.must(&Say::Attach { domain });
        (accessor, crate::actor::text(&session))
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
    pub fn begin(&mut self, say: &Say) {
        let line = serde_json::to_string(say).expect("JSON");
        writeln!(self.stdin, "{line}").expect("it listens");
    }

    /// The next thing that it, or what it has left behind, says.
    ///
    /// # Panics
    /// If nothing comes.
    #[track_caller]
    pub fn hear(&mut self) -> Said {
        match self.said.recv_timeout(LIMIT) {
            Ok(said) => said,
            Err(error) => panic!("accessor {} says nothing: {error}", self.pid()),
        }
    }

    /// Does one thing.
    #[track_caller]
    pub fn ask(&mut self, say: &Say) -> Said {
        self.begin(say);
        self.hear()
    }

    /// Does one thing, which must succeed.
    ///
    /// # Panics
    /// If it does not.
    #[track_caller]
    pub fn must(&mut self, say: &Say) -> Value {
        match self.ask(say) {
            Ok(value) => value,
            Err(error) => panic!("{say:?}: {error}"),
        }
    }

    /// Reads, or says why not.
    ///
    /// # Errors
    /// What the library says.
    ///
    /// # Panics
    /// If that is no list of bytes.
    #[track_caller]
    pub fn read(&mut self, iova: u64, len: usize) -> Result<Vec<u8>, String> {
        let bytes = self.ask(&Say::Read { iova, len })?;
        Ok(serde_json::from_value(bytes).expect("bytes"))
    }

    /// SIGKILL, and wait for the corpse.
    pub fn kill(&mut self) {
        children::kill(&mut self.child);
    }
}

impl Drop for Accessor {
    fn drop(&mut self) {
        self.kill();
    }
}
