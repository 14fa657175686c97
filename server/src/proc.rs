//! The few things that only `/proc` and the cgroup tree tell.

use std::fs;
use std::io::{self, ErrorKind};

/// Start time of a process in clock ticks since boot: with the pid it names a
/// process where pidfds have no inodes.
pub(crate) fn start_time(pid: i32) -> io::Result<u64> {
    stat_field(pid, 22)
}

/// Has its first thread begun to exit? Others may live on, and the process with
/// them.
pub(crate) fn is_exiting(pid: i32) -> io::Result<bool> {
    /// `PF_EXITING` (linux/sched.h).
    const EXITING: u64 = 0x4;
    Ok(stat_field(pid, 9)? & EXITING != 0)
}

/// A number of `/proc/<pid>/stat`, counted from 1, behind the command.
fn stat_field(pid: i32, field: usize) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The command in field 2 may contain anything, so count behind it.
    let behind = stat.rsplit_once(')').map(|(_, rest)| rest);
    let number = behind.and_then(|rest| rest.split_ascii_whitespace().nth(field - 3)?.parse().ok());
    number.ok_or_else(|| {
        io::Error::new(
            ErrorKind::InvalidData,
            format!("/proc/{pid}/stat without field {field}"),
        )
    })
}

/// The capabilities that a process has or could raise, one bit each.
pub(crate) fn permitted_capabilities(pid: i32) -> io::Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("CapPrm:"));
    let bits = line.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
    bits.ok_or_else(|| {
        io::Error::new(
            ErrorKind::InvalidData,
            format!("/proc/{pid}/status without CapPrm"),
        )
    })
}

/// The uid that stands for users this user namespace does not know.
pub(crate) fn overflow_uid() -> u32 {
    let text = fs::read_to_string("/proc/sys/kernel/overflowuid").unwrap_or_default();
    text.trim().parse().unwrap_or(65534)
}

/// Open file descriptors of this process, but for the one that counts them.
pub(crate) fn open_fds() -> usize {
    fs::read_dir("/proc/self/fd").map_or(0, |links| links.count().saturating_sub(1))
}

/// Threads of this process.
pub(crate) fn threads() -> usize {
    fs::read_dir("/proc/self/task").map_or(0, Iterator::count)
}

/// Memory that this process may use at most, in bytes: the machine's, or the
/// smallest limit of the cgroups (v2 or v1) that it is in.
pub(crate) fn memory_bytes() -> u64 {
    let info = rustix::system::sysinfo();
    let machine = info.totalram.saturating_mul(u64::from(info.mem_unit));
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    own.lines()
        .flat_map(limit_files)
        .filter_map(|file| limit_in(&file))
        .fold(machine, u64::min)
}

/// The limit files along the path of one line of `/proc/self/cgroup`. In a
/// cgroup namespace the paths start at the container's own cgroup.
fn limit_files(line: &str) -> Vec<String> {
    let mut fields = line.splitn(3, ':');
    let (_, Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else {
        return Vec::new();
    };
    let (root, name) = match controllers {
        "" => ("/sys/fs/cgroup", "memory.max"),
        "memory" => ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
        _ => return Vec::new(),
    };
    let mut files = vec![format!("{root}/{name}")];
    let mut at = root.to_owned();
    for step in path.split('/').filter(|step| !step.is_empty()) {
        at = format!("{at}/{step}");
        files.push(format!("{at}/{name}"));
    }
    files
}

/// `None` for "max" and for files that are not there.
fn limit_in(file: &str) -> Option<u64> {
    fs::read_to_string(file).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_has_a_start_time_and_its_parent_started_before_it() {
        let own = start_time(rustix::process::getpid().as_raw_nonzero().get()).unwrap();
        let parent = rustix::process::getppid().unwrap().as_raw_nonzero().get();
        assert!(start_time(parent).unwrap() <= own);
    }

    #[test]
    fn the_path_of_a_cgroup_is_walked_from_its_root() {
        let files = limit_files("4:memory:/kubepods/pod1");
        assert_eq!(files.len(), 3);
        assert_eq!(
            files[2],
            "/sys/fs/cgroup/memory/kubepods/pod1/memory.limit_in_bytes"
        );
        assert_eq!(limit_files("0::/")[0], "/sys/fs/cgroup/memory.max");
        assert!(limit_files("2:cpu:/x").is_empty() && limit_files("nonsense").is_empty());
    }

    #[test]
    fn what_is_counted_is_there() {
        assert!(open_fds() >= 3 && threads() >= 1 && memory_bytes() > 1 << 20);
    }
}
