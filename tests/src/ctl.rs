//! The command line, as a process.

use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use serde_json::Value;

use crate::children;
use crate::node::{Node, without_settings};
use crate::users::User;
use crate::wait;

/// How long a command may take; the demo moves real data.
const LIMIT: Duration = Duration::from_secs(60);

/// `domainctl`, pointed at one daemon or none.
#[derive(Clone, Debug)]
pub struct Ctl {
    runtime_dir: Option<PathBuf>,
}

/// What a command left.
#[derive(Clone, Debug)]
pub struct Output {
    /// Its exit code; 256 and more: killed by that signal less 256.
    pub code: i32,
    /// Data.
    pub stdout: String,
    /// Trouble.
    pub stderr: String,
}

impl Ctl {
    /// For a running daemon.
    #[must_use]
    pub fn new(node: &Node) -> Ctl {
        Ctl::at(node.runtime_dir().path())
    }

    /// For a directory in which there may be no daemon.
    #[must_use]
    pub fn at(runtime_dir: &Path) -> Ctl {
        Ctl {
            runtime_dir: Some(runtime_dir.to_owned()),
        }
    }

    /// For no daemon: the command brings its own, or needs none.
    #[must_use]
    pub fn alone() -> Ctl {
        Ctl { runtime_dir: None }
    }

    /// The command, ready to be changed further.
    #[must_use]
    pub fn command(&self, line: &[&str]) -> Command {
        let mut command = without_settings(Command::new(children::program("domainctl")));
        command.args(line);
        if let Some(dir) = &self.runtime_dir {
            command.arg("--runtime-dir").arg(dir);
        }
        command.stdin(Stdio::null());
        command
    }

    /// The same as somebody else, which only root can.
    #[must_use]
    pub fn command_as(node: &Node, user: User, line: &[&str]) -> Command {
        let program = children::program_for_all(node.path(), "domainctl");
        let mut command = without_settings(Command::new(program));
        command.args(line).arg("--runtime-dir");
        command.arg(node.runtime_dir().path()).current_dir("/");
        command.uid(user.uid).gid(user.gid).stdin(Stdio::null());
        command
    }

    /// Runs a command to its end.
    ///
    /// # Panics
    /// If it does not start or does not end.
    #[must_use]
    pub fn run(&self, line: &[&str]) -> Output {
        finish(start(self.command(line)))
    }

    /// Runs a command that must succeed; its standard output.
    ///
    /// # Panics
    /// If it fails.
    #[must_use]
    #[track_caller]
    pub fn ok(&self, line: &[&str]) -> String {
        let output = self.run(line);
        assert_eq!(output.code, 0, "domainctl {line:?}: {output:?}");
        output.stdout
    }

    /// Runs a command with `-o json` that must succeed; its object.
    ///
    /// # Panics
    /// If it fails, or prints no JSON.
    #[must_use]
    #[track_caller]
    pub fn json(&self, line: &[&str]) -> Value {
        let line: Vec<_> = line.iter().copied().chain(["-o", "json"]).collect();
        let text = self.ok(&line);
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    /// Runs a command that must fail with this code, say why, and print no
    /// data; what it says.
    ///
    /// # Panics
    /// If it does otherwise.
    #[track_caller]
    pub fn fails(&self, line: &[&str], code: i32) -> String {
        let output = self.run(line);
        assert_eq!(output.code, code, "domainctl {line:?}: {output:?}");
        assert_eq!(output.stdout, "", "domainctl {line:?} prints no data");
        assert!(!output.stderr.is_empty(), "domainctl {line:?} says why");
        output.stderr
    }
}

/// Starts a command with pipes on both outputs.
///
/// # Panics
/// If it does not start.
#[must_use]
pub fn start(mut command: Command) -> Child {
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    children::spawn(&mut command)
}

/// Writes to a child's standard input and closes it. One that has gone is
/// fine.
///
/// # Panics
/// If it has no pipe there.
pub fn feed(child: &mut Child, bytes: &[u8]) {
    let mut stdin = child.stdin.take().expect("a pipe");
    let _ = stdin.write_all(bytes);
}

/// Waits for the end of a command.
///
/// # Panics
/// If it does not come.
#[must_use]
pub fn finish(mut child: Child) -> Output {
    let stdout = drain(child.stdout.take());
    let stderr = drain(child.stderr.take());
    let status = children::end_of(&mut child, LIMIT);
    let signal = std::os::unix::process::ExitStatusExt::signal(&status);
    Output {
        code: status.code().unwrap_or_else(|| 256 + signal.unwrap_or(0)),
        stdout: rest(&stdout),
        stderr: rest(&stderr),
    }
}

/// Reads beside the waiting, so that a full pipe stops nobody.
fn drain(pipe: Option<impl Read + Send + 'static>) -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = pipe.read_to_end(&mut bytes);
        }
        let _ = sender.send(String::from_utf8_lossy(&bytes).into_owned());
    });
    receiver
}

/// All that was written; the writer has ended.
fn rest(output: &mpsc::Receiver<String>) -> String {
    let text = output.recv_timeout(wait::DEADLINE);
    text.expect("somebody whom the command started still holds its output")
}
