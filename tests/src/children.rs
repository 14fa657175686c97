//! Processes: the programs under test, and their ends.

use std::fs::{self, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};

use crate::wait;

/// A program that cargo has built beside this test.
///
/// # Panics
/// If it is not there.
#[must_use]
pub fn program(name: &str) -> PathBuf {
    let me = std::env::current_exe().expect("a process knows its program");
    // Tests lie in deps/, binaries one above.
    let beside = me.ancestors().skip(1).take(2).map(|dir| dir.join(name));
    let found = beside.into_iter().find(|path| path.is_file());
    found.unwrap_or_else(|| panic!("{name} is not built: run ./test.sh, which builds it first"))
}

/// A copy of such a program that every user may run: the target directory may
/// lie where others cannot go.
///
/// # Panics
/// If it cannot be copied.
#[must_use]
pub fn program_for_all(dir: &Path, name: &str) -> PathBuf {
    let copy = dir.join(name);
    if !copy.exists() {
        fs::copy(program(name), &copy).expect("copied");
        fs::set_permissions(&copy, Permissions::from_mode(0o755)).expect("chmod");
    }
    copy
}

/// Starts a command.
///
/// A program that was just copied is busy as long as any process, even a child
/// that another test is about to start, has inherited the fd that wrote it.
///
/// # Panics
/// If it does not start.
pub fn spawn(command: &mut Command) -> Child {
    wait::find("a program that is not busy", || match command.spawn() {
        Ok(child) => Some(child),
        Err(error) if error.kind() == ErrorKind::ExecutableFileBusy => None,
        Err(error) => panic!("{command:?}: {error}"),
    })
}

/// Runs a command to its end, quietly; what it said if it failed.
pub fn tries(words: &[&str]) -> Result<(), String> {
    let output = Command::new(words[0]).args(&words[1..]).output();
    match output {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        Err(error) => Err(format!("{words:?}: {error}")),
    }
}

/// Sends a signal to one process, by its id. One that has gone already is
/// fine.
///
/// # Panics
/// If the process may not be signalled.
pub fn signal(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(pid.cast_signed()).expect("a pid is not 0");
    match rustix::process::kill_process(pid, signal) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => {}
        Err(error) => panic!("signalling {pid:?}: {error}"),
    }
}

/// SIGSTOP, and wait until none of its threads runs.
///
/// # Panics
/// If one goes on.
pub fn stop(pid: u32) {
    signal(pid, Signal::STOP);
    wait::until("the stop of a process", || {
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("it is there");
        let stats = tasks.flatten().map(|task| task.path().join("stat"));
        stats.filter_map(read_stat).all(|stat| stat.state == 'T')
    });
}

/// SIGKILL, and wait for the corpse.
///
/// # Panics
/// If it does not die.
pub fn kill(child: &mut Child) -> ExitStatus {
    // An error means that it is dead.
    let _ = child.kill();
    child.wait().expect("a child can be waited for")
}

/// Waits for the end of a child that ends by itself.
///
/// # Panics
/// If it does not; it is killed then.
pub fn end_of(child: &mut Child, within: Duration) -> ExitStatus {
    let until = Instant::now() + within;
    loop {
        if let Some(status) = child.try_wait().expect("a child can be waited for") {
            return status;
        }
        if Instant::now() > until {
            kill(child);
            panic!("process {} did not end within {within:?}", child.id());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Whether a process is there and not a zombie.
#[must_use]
pub fn is_alive(pid: u32) -> bool {
    stat(pid).is_some_and(|stat| stat.state != 'Z' && stat.state != 'X')
}

/// Waits until a process that is not our child is gone.
///
/// # Panics
/// If it stays.
pub fn wait_until_gone(pid: u32) {
    wait::until(&format!("the end of process {pid}"), || !is_alive(pid));
}

/// What of `/proc/{pid}/stat` these tests use.
#[derive(Clone, Copy, Debug)]
struct Stat {
    state: char,
    parent: u32,
}

fn stat(pid: u32) -> Option<Stat> {
    read_stat(format!("/proc/{pid}/stat"))
}

fn read_stat(path: impl AsRef<Path>) -> Option<Stat> {
    let text = fs::read_to_string(path).ok()?;
    // The name, in parentheses, may hold anything.
    let mut fields = text.rsplit_once(')')?.1.split_whitespace();
    Some(Stat {
        state: fields.next()?.chars().next()?,
        parent: fields.next()?.parse().ok()?,
    })
}

/// The living descendants of a process.
#[must_use]
pub fn descendants(of: u32) -> Vec<u32> {
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let family: Vec<(u32, u32)> = pids
        .filter(|pid| is_alive(*pid))
        .filter_map(|pid| Some((pid, stat(pid)?.parent)))
        .collect();
    let mut found = vec![of];
    let mut next = 0;
    while next < found.len() {
        let parent = found[next];
        found.extend(family.iter().filter(|(_, p)| *p == parent).map(|(c, _)| c));
        next += 1;
    }
    found.split_off(1)
}

/// How a process ended, in one number or one signal.
#[must_use]
pub fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, signal) => format!("signal {signal:?}"),
    }
}
