//! The few things that only `/proc` and the cgroup tree tell.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

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
    let limit = cgroup_limit(Path::new("/sys/fs/cgroup"), &own);
    limit.map_or(machine, |limit| limit.min(machine))
}

/// The smallest limit along the paths of `/proc/self/cgroup`, below where cgroups
/// are mounted. `None` without any.
///
/// In a cgroup namespace a path begins at the container's own cgroup, and so does
/// what is mounted. Without one the path begins at the machine's root and may not be
/// there below a mount that begins at the container's cgroup: then the first file
/// alone is there, and it is ours.
fn cgroup_limit(mounted_at: &Path, own: &str) -> Option<u64> {
    let files = own.lines().flat_map(|line| limit_files(mounted_at, line));
    files.filter_map(|file| limit_in(&file)).min()
}

/// The limit files along the path of one line.
fn limit_files(mounted_at: &Path, line: &str) -> Vec<PathBuf> {
    let mut fields = line.splitn(3, ':');
    let (_, Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else {
        return Vec::new();
    };
    let is_memory = controllers.split(',').any(|name| name == "memory");
    let (mut at, name) = match (controllers, is_memory) {
        ("", _) => (mounted_at.to_owned(), "memory.max"),
        (_, true) => (mounted_at.join("memory"), "memory.limit_in_bytes"),
        (_, false) => return Vec::new(),
    };
    let mut files = vec![at.join(name)];
    let steps = path.split('/').filter(|step| !step.is_empty());
    for step in steps.filter(|step| *step != "..") {
        at.push(step);
        files.push(at.join(name));
    }
    files
}

/// `None` for "max" and for files that are not there.
fn limit_in(file: &Path) -> Option<u64> {
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
        let files = |line| limit_files(Path::new("/c"), line);
        let walked = files("4:memory:/kubepods/pod1");
        assert_eq!(walked.len(), 3);
        assert_eq!(
            walked[2],
            Path::new("/c/memory/kubepods/pod1/memory.limit_in_bytes")
        );
        assert_eq!(files("0::/")[0], Path::new("/c/memory.max"));
        assert!(files("2:cpu:/x").is_empty() && files("nonsense").is_empty());
    }

    /// A cgroup tree of files, as a container sees it.
    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (path, limit) in files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{limit}\n")).unwrap();
        }
        dir
    }

    #[test]
    fn the_smallest_limit_on_the_way_counts_in_either_version() {
        let v2 = tree(&[
            ("memory.max", "max"),
            ("a/memory.max", "67108864"),
            ("a/b/memory.max", "max"),
        ]);
        assert_eq!(cgroup_limit(v2.path(), "0::/a/b\n"), Some(64 << 20));
        assert_eq!(cgroup_limit(v2.path(), "0::/\n"), None);
        let v1 = tree(&[
            ("memory/memory.limit_in_bytes", "9223372036854771712"),
            ("memory/kubepods/memory.limit_in_bytes", "134217728"),
            ("memory/kubepods/pod1/memory.limit_in_bytes", "67108864"),
        ]);
        let hybrid = "9:name=systemd:/\n4:cpu,memory:/kubepods/pod1/c\n0::/\n";
        assert_eq!(cgroup_limit(v1.path(), hybrid), Some(64 << 20));
    }

    #[test]
    fn in_a_container_the_limit_is_at_the_root_of_what_is_mounted() {
        let v2 = tree(&[("memory.max", "67108864")]);
        let v1 = tree(&[("memory/memory.limit_in_bytes", "67108864")]);
        // With a cgroup namespace, and without one.
        for own in ["0::/\n", "0::/kubepods/pod1/c\n"] {
            assert_eq!(cgroup_limit(v2.path(), own), Some(64 << 20), "{own}");
        }
        for own in ["4:memory:/\n0::/\n", "4:memory:/kubepods/pod1/c\n"] {
            assert_eq!(cgroup_limit(v1.path(), own), Some(64 << 20), "{own}");
        }
    }

    #[test]
    fn what_is_counted_is_there() {
        assert!(open_fds() >= 3 && threads() >= 1 && memory_bytes() > 1 << 20);
    }
}
