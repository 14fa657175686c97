//! Tests that need a pid namespace of their own: such a test runs itself again
//! in one, where pids are given as it says and nobody else takes any.

use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::children;

/// Set in the process that runs inside.
const INSIDE: &str = "DOMAIND_TEST_NAMESPACE";
/// How long a test may take inside.
const LIMIT: Duration = Duration::from_secs(120);

/// Where a test is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Where {
    /// In a pid namespace of its own.
    Inside,
    /// Outside, and it has passed inside.
    Done,
    /// Outside, and the kernel lets nobody in; why.
    Forbidden(String),
}

/// Runs the test of this name again in a pid namespace of its own, as root
/// there; whoever runs the tests need not be root.
///
/// # Panics
/// If it does not pass there.
#[must_use]
pub fn enter(test: &str) -> Where {
    if std::env::var_os(INSIDE).is_some() {
        return Where::Inside;
    }
    if let Some(why) = refusal() {
        return Where::Forbidden(why);
    }
    let this = std::env::current_exe().expect("a process knows its program");
    let mut child = unshare()
        .arg(this)
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(INSIDE, "1")
        .spawn()
        .expect("unshare starts");
    let status = children::end_of(&mut child, LIMIT);
    let how = children::describe(status);
    assert!(status.success(), "{test} in a pid namespace: {how}");
    Where::Done
}

/// Why nobody gets in, if so.
fn refusal() -> Option<String> {
    let tried = unshare().arg("true").stdin(Stdio::null()).output();
    match tried {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        Err(error) => Some(format!("unshare: {error}")),
    }
}

/// All inside dies with it.
fn unshare() -> Command {
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user"]);
    command.args(["--pid", "--fork", "--kill-child", "--mount-proc"]);
    command
}

/// Makes a process that has this pid: it is the next that is given. `None` if a
/// thread that somebody has started meanwhile has it now.
///
/// # Panics
/// If the namespace is not ours.
pub fn with_pid<T>(pid: u32, start: impl FnOnce() -> T, pid_of: impl Fn(&T) -> u32) -> Option<T> {
    let last = (pid - 1).to_string();
    fs::write("/proc/sys/kernel/ns_last_pid", last).expect("root of the namespace may");
    Some(start()).filter(|started| pid_of(started) == pid)
}
