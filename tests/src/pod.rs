//! A cgroup as the kubelet makes one for a pod's container. Only root can.

use std::fs;
use std::path::{Path, PathBuf};

use crate::wait;

/// A container's cgroup; removed on drop, when nobody is in it any more.
#[derive(Debug)]
pub struct PodCgroup {
    /// The pod's uid.
    pub pod: String,
    /// The container's id.
    pub container: String,
    /// From the pods' root to the container.
    dirs: Vec<PathBuf>,
}

impl PodCgroup {
    /// Makes it in the hierarchy of the memory controller, or in the only one.
    ///
    /// # Panics
    /// If it cannot be made.
    #[must_use]
    pub fn make(pod: &str, container: &str) -> PodCgroup {
        let v1 = Path::new("/sys/fs/cgroup/memory");
        let root = match v1.join("cgroup.procs").exists() {
            true => v1,
            false => Path::new("/sys/fs/cgroup"),
        };
        let mut dir = root.to_owned();
        let mut dirs = Vec::new();
        for step in ["kubepods", "burstable", &format!("pod{pod}"), container] {
            dir.push(step);
            dirs.push(dir.clone());
        }
        fs::create_dir_all(&dir).expect("root may make cgroups: the test needs one");
        PodCgroup {
            pod: pod.to_owned(),
            container: container.to_owned(),
            dirs,
        }
    }

    /// Takes a process in.
    ///
    /// # Panics
    /// If it does not come.
    pub fn take(&self, pid: u32) {
        let innermost = self.dirs.last().expect("four of them");
        fs::write(innermost.join("cgroup.procs"), pid.to_string()).expect("root may move it");
    }
}

impl Drop for PodCgroup {
    fn drop(&mut self) {
        let [.., container] = &self.dirs[..] else {
            return;
        };
        if !std::thread::panicking() {
            wait::until("an empty cgroup", || fs::remove_dir(container).is_ok());
        }
        // Other tests may be using those above.
        for dir in self.dirs.iter().rev() {
            let _ = fs::remove_dir(dir);
        }
    }
}
