//! Where a process runs, as its cgroups say: in which pod and container, or in
//! which systemd unit; and which groups it has.
//!
//! A path is believed only where nobody but root could have made it. A user may
//! make cgroups below its own `user@1000.service`, and a container below its own
//! cgroup, with any names: so a pod counts only at the place where the kubelet
//! puts pods, the first that is met on the way from the root, and a unit only
//! where systemd starts them.

use std::fmt;
use std::fs;
use std::path::Path;
use std::sync::LazyLock;

use crate::proc;

/// What Kubernetes sets if it is asked to (the downward API).
const OWN_POD_VAR: &str = "POD_UID";
/// The cgroup namespace that the machine starts with (`PROC_CGROUP_INIT_INO`).
const INITIAL_NAMESPACE: &str = "cgroup:[4026531835]";
/// Digits of a container's id, with every runtime.
const CONTAINER_DIGITS: usize = 64;

/// The uid of a pod: a UUID, or the 32 digits that a static pod has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct PodUid {
    bits: u128,
    has_hyphens: bool,
}

/// Where a process runs, and its groups. All of it is empty for a process of
/// which nothing of that kind is to be said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Placement {
    pub(crate) pod: Option<PodUid>,
    pub(crate) container: Option<String>,
    /// Never with a pod.
    pub(crate) unit: Option<String>,
    /// Supplementary ones. None if they may be another program's than that
    /// which connected.
    pub(crate) groups: Vec<u32>,
}

/// From where this process looks at cgroups.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Vantage {
    /// Paths begin at our own cgroup: `/../../pod…` is somebody else.
    is_private: bool,
    /// The pod that we are in, where paths cannot tell.
    own_pod: Option<PodUid>,
}

/// What one path says.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    Pod(PodUid, Option<String>),
    /// Our own cgroup, one below it, or one beside it.
    WithUs(Option<String>),
    Unit(String),
    /// Neither, or not to be believed.
    Elsewhere,
    /// Among the pods, and in none that can be read.
    Astray,
}

impl PodUid {
    /// Lower-case digits, in groups as a UUID or all in one.
    pub(crate) fn parse(text: &str) -> Option<PodUid> {
        let has_hyphens = text.contains('-');
        let is_grouped = || {
            let groups = text.split('-').map(str::len);
            groups.eq([8, 4, 4, 4, 12])
        };
        if has_hyphens && !is_grouped() {
            return None;
        }
        let digits = text.replace('-', "");
        (digits.len() == 32 && is_lower_hex(&digits))
            .then(|| u128::from_str_radix(&digits, 16).ok())?
            .map(|bits| PodUid { bits, has_hyphens })
    }
}

impl fmt::Display for PodUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = format!("{:032x}", self.bits);
        if !self.has_hyphens {
            return f.write_str(&digits);
        }
        let [a, b, c, d] = [0..8, 8..12, 12..16, 16..20].map(|part| &digits[part]);
        write!(f, "{a}-{b}-{c}-{d}-{}", &digits[20..])
    }
}

impl Vantage {
    /// That of this process, which does not change.
    pub(crate) fn own() -> Vantage {
        static OWN: LazyLock<Vantage> = LazyLock::new(|| {
            let namespace = fs::read_link("/proc/self/ns/cgroup");
            // Kernels without cgroup namespaces have the initial one.
            let is_initial = namespace.map_or_else(
                |cause| cause.kind() == std::io::ErrorKind::NotFound,
                |link| link == Path::new(INITIAL_NAMESPACE),
            );
            let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
            let pod = std::env::var(OWN_POD_VAR).unwrap_or_default();
            Vantage::new(is_initial, &own, &pod)
        });
        *OWN
    }

    /// A namespace of one's own that begins above one's own cgroup is that of a
    /// whole system in a container, and as good as the initial one.
    fn new(is_initial: bool, own_cgroups: &str, own_pod: &str) -> Vantage {
        let own_pod = match own_pod {
            "" => None,
            text => PodUid::parse(text).or_else(|| {
                tracing::warn!(text, "{OWN_POD_VAR} is not a pod's uid and is not used");
                None
            }),
        };
        Vantage {
            is_private: !is_initial && paths(own_cgroups).all(|path| path == "/"),
            own_pod,
        }
    }
}

impl Placement {
    /// Of a process that has these ids now; `None` if it cannot be said. The
    /// caller has to look afterwards whether it still is the same process.
    pub(crate) fn of(pid: i32, uid: u32, gid: u32) -> Option<Placement> {
        let cgroups = fs::read(format!("/proc/{pid}/cgroup")).ok()?;
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        // Last: of a process whose first thread has ended, while others live on,
        // the kernel says "/" for every cgroup of version 1.
        if proc::is_exiting(pid).ok()? {
            return None;
        }
        let cgroups = String::from_utf8_lossy(&cgroups);
        let mut placement = Placement::read(&cgroups, Vantage::own())?;
        placement.groups = groups(&status, uid, gid);
        Some(placement)
    }

    /// What `/proc/<pid>/cgroup` says; `None` if it contradicts itself, or says
    /// that the process is among the pods and not in which.
    fn read(cgroups: &str, vantage: Vantage) -> Option<Placement> {
        let places: Vec<_> = paths(cgroups).map(|path| place(path, vantage)).collect();
        if places.is_empty() || places.contains(&Place::Astray) {
            return None;
        }
        let pods = places.iter().filter_map(|place| match place {
            Place::Pod(pod, _) => Some(*pod),
            _ => None,
        });
        let pod = match only_one(pods) {
            One::None => with_us(&places).and(vantage.own_pod),
            One::Some(pod) => Some(pod),
            One::Several => return None,
        };
        if pod.is_some() {
            let containers = places.iter().filter_map(|place| match place {
                Place::Pod(_, container) | Place::WithUs(container) => container.clone(),
                _ => None,
            });
            return Some(Placement {
                pod,
                container: only_one(containers).some(),
                ..Placement::default()
            });
        }
        let units = places.into_iter().filter_map(|place| match place {
            Place::Unit(unit) => Some(unit),
            _ => None,
        });
        Some(Placement {
            unit: only_one(units).some(),
            ..Placement::default()
        })
    }
}

/// How many different ones there are.
enum One<T> {
    None,
    Some(T),
    Several,
}

impl<T> One<T> {
    fn some(self) -> Option<T> {
        match self {
            One::Some(one) => Some(one),
            One::None | One::Several => None,
        }
    }
}

fn only_one<T: PartialEq>(mut all: impl Iterator<Item = T>) -> One<T> {
    let Some(first) = all.next() else {
        return One::None;
    };
    match all.all(|other| other == first) {
        true => One::Some(first),
        false => One::Several,
    }
}

/// Is it where we are, by every hierarchy? One in which nobody is anywhere says
/// the same of all, so one that says otherwise is believed.
fn with_us(places: &[Place]) -> Option<()> {
    places
        .iter()
        .all(|place| matches!(place, Place::WithUs(_)))
        .then_some(())
}

/// The path of each line.
fn paths(cgroups: &str) -> impl Iterator<Item = &str> {
    cgroups
        .lines()
        .filter_map(|line| line.splitn(3, ':').nth(2))
}

fn place(path: &str, vantage: Vantage) -> Place {
    let steps: Vec<_> = path.split('/').filter(|step| !step.is_empty()).collect();
    let up = steps.iter().take_while(|step| **step == "..").count();
    let down = &steps[up..];
    if down.contains(&"..") {
        return Place::Astray;
    }
    match (vantage.is_private, up) {
        (false, 0) => match among_pods(down, Begins::AtTheRoot) {
            Place::Elsewhere => unit(down).map_or(Place::Elsewhere, Place::Unit),
            place => place,
        },
        // A whole system in a container sees what is outside of it.
        (false, _) => Place::Elsewhere,
        (true, 0) => Place::WithUs(None),
        // Beside us, so in our pod, if we are in one.
        (true, 1) => Place::WithUs(down.first().and_then(|name| container(name))),
        (true, _) => among_pods(down, Begins::Anywhere),
    }
}

/// Where the part of a path begins that is looked at.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Begins {
    AtTheRoot,
    /// At a cgroup that ours lies in, of which the name is not to be seen.
    Anywhere,
}

/// `kubepods`, the class, the pod, the container: whatever comes first must be
/// the first there is.
fn among_pods(steps: &[&str], begins: Begins) -> Place {
    let mut rest = steps;
    let is_led = skip(&mut rest, is_root_of_pods);
    if !is_led && begins == Begins::AtTheRoot {
        return Place::Elsewhere;
    }
    let is_led = skip(&mut rest, is_class) || is_led;
    let (name, below) = match rest.split_first() {
        Some((name, below)) => (*name, below),
        None if is_led => return Place::Astray,
        None => return Place::Elsewhere,
    };
    match pod(name) {
        Some(pod) => Place::Pod(pod, below.first().and_then(|name| container(name))),
        None if is_led => Place::Astray,
        None => Place::Elsewhere,
    }
}

/// Leaves the first step behind, if it is of this kind.
fn skip(steps: &mut &[&str], is_it: fn(&str) -> bool) -> bool {
    match steps.split_first() {
        Some((first, rest)) if is_it(first) => {
            *steps = rest;
            true
        }
        _ => false,
    }
}

fn is_root_of_pods(name: &str) -> bool {
    matches!(name, "kubepods" | "kubepods.slice")
}

fn is_class(name: &str) -> bool {
    matches!(
        name,
        "burstable" | "besteffort" | "kubepods-burstable.slice" | "kubepods-besteffort.slice"
    )
}

/// `pod<uid>`, or `kubepods-burstable-pod<uid>.slice`, in which systemd has no
/// hyphens.
fn pod(name: &str) -> Option<PodUid> {
    if let Some(uid) = name.strip_prefix("pod") {
        return PodUid::parse(uid);
    }
    let name = name.strip_prefix("kubepods-")?.strip_suffix(".slice")?;
    let classes = ["burstable-", "besteffort-"];
    let class = classes.iter().find_map(|class| name.strip_prefix(class));
    let uid = class.unwrap_or(name).strip_prefix("pod")?;
    PodUid::parse(&uid.replace('_', "-"))
}

/// The id alone, or `cri-containerd-<id>.scope` and the like.
fn container(name: &str) -> Option<String> {
    let name = name.strip_suffix(".scope").unwrap_or(name);
    let runtimes = ["cri-containerd-", "crio-", "docker-"];
    let runtime = runtimes
        .iter()
        .find_map(|runtime| name.strip_prefix(runtime));
    let id = runtime.unwrap_or(name);
    (id.len() == CONTAINER_DIGITS && is_lower_hex(id)).then(|| id.to_owned())
}

/// The first that is no slice: what lies below it is the unit's own affair.
fn unit(steps: &[&str]) -> Option<String> {
    const KINDS: [&str; 5] = [".service", ".scope", ".socket", ".mount", ".swap"];
    let name = steps.iter().find(|step| !step.ends_with(".slice"))?;
    // How systemd keeps names apart from the kernel's own files.
    let name = name.strip_prefix('_').unwrap_or(name);
    let kind = KINDS.iter().find(|kind| name.ends_with(**kind))?;
    (name.len() > kind.len()).then(|| name.to_owned())
}

/// Supplementary groups of `/proc/<pid>/status`, if uid and gid are still those
/// of the moment of connecting: a program that was executed since and became
/// somebody else has other groups.
fn groups(status: &str, uid: u32, gid: u32) -> Vec<u32> {
    let numbers = |key: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(key));
        let words = line.unwrap_or_default().split_ascii_whitespace();
        words
            .filter_map(|word| word.parse::<u32>().ok())
            .collect::<Vec<_>>()
    };
    // Real, effective, saved, of the file system.
    let effective = |key| numbers(key).get(1).copied();
    match (effective("Uid:"), effective("Gid:")) == (Some(uid), Some(gid)) {
        true => numbers("Groups:"),
        false => Vec::new(),
    }
}

fn is_lower_hex(text: &str) -> bool {
    text.bytes()
        .all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "0f3c2a91-7d54-4b1e-9c88-3f5be1a2d007";
    const UNDERSCORES: &str = "0f3c2a91_7d54_4b1e_9c88_3f5be1a2d007";
    const OTHER: &str = "5a5a5a5a-0000-4000-8000-00000000beef";
    const STATIC: &str = "b7e2d9a0f1c34e5d8a6b7c8d9e0f1a2b";

    fn id() -> String {
        "c0ffee00".repeat(8)
    }

    fn uid(text: &str) -> PodUid {
        PodUid::parse(text).unwrap()
    }

    const ROOT: Vantage = Vantage {
        is_private: false,
        own_pod: None,
    };
    const PRIVATE: Vantage = Vantage {
        is_private: true,
        own_pod: None,
    };

    fn in_own_pod() -> Vantage {
        Vantage {
            is_private: true,
            own_pod: Some(uid(OTHER)),
        }
    }

    /// What a process is that has this path in the one hierarchy of version 2.
    fn at(path: &str, vantage: Vantage) -> Option<Placement> {
        Placement::read(&format!("0::{path}\n"), vantage)
    }

    fn in_pod(pod: &str, container: Option<&str>) -> Option<Placement> {
        Some(Placement {
            pod: Some(uid(pod)),
            container: container.map(str::to_owned),
            ..Placement::default()
        })
    }

    fn in_unit(unit: &str) -> Option<Placement> {
        Some(Placement {
            unit: Some(unit.to_owned()),
            ..Placement::default()
        })
    }

    const NOTHING: Option<Placement> = Some(Placement {
        pod: None,
        container: None,
        unit: None,
        groups: Vec::new(),
    });

    #[test]
    fn a_pods_uid_is_a_uuid_or_that_of_a_static_pod_and_is_shown_as_it_was() {
        for text in [UID, OTHER, STATIC] {
            assert_eq!(uid(text).to_string(), text);
        }
        // The same number is not the same name.
        assert_ne!(uid(&UID.replace('-', "")), uid(UID));
        for text in [
            "",
            "pod",
            &UID[1..],
            &UID.to_uppercase(),
            &UID.replace('-', "_"),
            &format!("{UID}0"),
            "0f3c2a917-d54-4b1e-9c88-3f5be1a2d007",
            "+f3c2a91-7d54-4b1e-9c88-3f5be1a2d007",
            &STATIC[1..],
            "-b7e2d9a0f1c34e5d8a6b7c8d9e0f1a2b",
        ] {
            assert_eq!(PodUid::parse(text), None, "{text:?}");
        }
    }

    #[test]
    fn a_pod_is_found_where_either_cgroup_driver_puts_it() {
        let id = id();
        for class in ["", "burstable/", "besteffort/"] {
            let path = format!("/kubepods/{class}pod{UID}/{id}");
            assert_eq!(at(&path, ROOT), in_pod(UID, Some(&id)), "{path}");
        }
        for runtime in ["cri-containerd", "crio", "docker"] {
            let scope = format!("{runtime}-{id}.scope");
            for path in [
                format!("/kubepods.slice/kubepods-pod{UNDERSCORES}.slice/{scope}"),
                format!(
                    "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{UNDERSCORES}.slice/{scope}"
                ),
                format!(
                    "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{UNDERSCORES}.slice/{scope}/deeper"
                ),
            ] {
                assert_eq!(at(&path, ROOT), in_pod(UID, Some(&id)), "{path}");
            }
        }
        let path = format!("/kubepods/burstable/pod{STATIC}/{id}");
        assert_eq!(at(&path, ROOT), in_pod(STATIC, Some(&id)));
        // What a runtime keeps beside its containers belongs to the pod.
        let path = format!("/kubepods/pod{UID}/crio-conmon-{id}");
        assert_eq!(at(&path, ROOT), in_pod(UID, None));
        assert_eq!(at(&format!("/kubepods/pod{UID}"), ROOT), in_pod(UID, None));
    }

    #[test]
    fn a_directory_with_the_name_of_a_pod_elsewhere_is_no_pod() {
        let id = id();
        for path in [
            format!("/user.slice/user-1000.slice/user@1000.service/kubepods/pod{UID}/{id}"),
            format!("/user.slice/user-1000.slice/user@1000.service/pod{UID}/{id}"),
        ] {
            assert_eq!(at(&path, ROOT), in_unit("user@1000.service"), "{path}");
        }
        for path in [
            format!("/docker/{id}/kubepods/pod{UID}/{id}"),
            format!("/pod{UID}/{id}"),
            format!("/burstable/pod{UID}/{id}"),
            format!("/kubepods-pod{UNDERSCORES}.slice/{id}"),
            format!("/kubepodsx/pod{UID}/{id}"),
            format!("/x/kubepods.slice/kubepods-pod{UNDERSCORES}.slice/{id}"),
        ] {
            assert_eq!(at(&path, ROOT), NOTHING, "{path}");
        }
    }

    #[test]
    fn a_container_that_nests_another_pods_name_stays_in_its_own() {
        let id = id();
        for path in [
            format!("/kubepods/pod{UID}/{id}/kubepods/burstable/pod{OTHER}/{id}"),
            format!("/kubepods/pod{UID}/{id}/pod{OTHER}/{id}"),
            format!("/kubepods/burstable/pod{UID}/{id}/system.slice/spdk.service"),
        ] {
            assert_eq!(at(&path, ROOT), in_pod(UID, Some(&id)), "{path}");
        }
        let path = format!("/../../pod{UID}/{id}/kubepods/pod{OTHER}/{id}");
        assert_eq!(at(&path, PRIVATE), in_pod(UID, Some(&id)));
    }

    #[test]
    fn who_is_among_the_pods_and_in_none_that_can_be_read_is_nobody_known() {
        let upper = UID.to_uppercase();
        for path in [
            "/kubepods".to_owned(),
            "/kubepods/burstable".to_owned(),
            "/kubepods/system.slice/spdk.service".to_owned(),
            format!("/kubepods/pod{upper}/{}", id()),
            format!("/kubepods/pod{}/x", &UID[1..]),
            format!("/kubepods/burstable/besteffort/pod{UID}"),
            format!("/kubepods/x/pod{UID}"),
            format!("/kubepods/../kubepods/pod{UID}"),
        ] {
            assert_eq!(at(&path, ROOT), None, "{path}");
        }
        assert_eq!(Placement::read("", ROOT), None);
        assert_eq!(Placement::read("no cgroups at all", ROOT), None);
    }

    #[test]
    fn from_a_private_namespace_pods_are_seen_from_our_own_cgroup() {
        let id = id();
        let scope = format!("cri-containerd-{id}.scope");
        for path in [
            // Of our own class; of another one; guaranteed.
            format!("/../../pod{UID}/{id}"),
            format!("/../../../besteffort/pod{UID}/{id}"),
            format!("/../../../pod{UID}/{id}"),
            format!("/../../../../kubepods/burstable/pod{UID}/{id}"),
            format!("/../../kubepods-burstable-pod{UNDERSCORES}.slice/{scope}"),
            format!(
                "/../../../kubepods-besteffort.slice/kubepods-besteffort-pod{UNDERSCORES}.slice/{scope}"
            ),
            format!("/../../../kubepods-pod{UNDERSCORES}.slice/{scope}"),
        ] {
            for vantage in [PRIVATE, in_own_pod()] {
                assert_eq!(at(&path, vantage), in_pod(UID, Some(&id)), "{path}");
            }
        }
        // There a unit is not to be told from a name that anybody gave.
        for path in [
            "/../../../../system.slice/spdk.service".to_owned(),
            "/../../../..".to_owned(),
            "/../../../../podman-1.scope".to_owned(),
            format!(
                "/../../../../user.slice/user-1000.slice/user@1000.service/kubepods/pod{UID}/{id}"
            ),
            format!("/../../../../user.slice/pod{UID}/{id}"),
        ] {
            for vantage in [PRIVATE, in_own_pod()] {
                assert_eq!(at(&path, vantage), NOTHING, "{path}");
            }
        }
        for path in ["/../../burstable", "/../../../kubepods/x", "/../x/../pod"] {
            assert_eq!(at(path, PRIVATE), None, "{path}");
        }
    }

    #[test]
    fn who_is_beside_us_in_a_private_namespace_is_in_our_pod_if_we_know_it() {
        let id = id();
        for path in ["/", "/below", "/.."] {
            assert_eq!(at(path, in_own_pod()), in_pod(OTHER, None), "{path}");
            assert_eq!(at(path, PRIVATE), NOTHING, "{path}");
        }
        let beside = format!("/../cri-containerd-{id}.scope");
        assert_eq!(at(&beside, in_own_pod()), in_pod(OTHER, Some(&id)));
        assert_eq!(at(&beside, PRIVATE), NOTHING);
        // In our own container anybody may give names.
        let below = format!("/kubepods/pod{UID}/{id}");
        assert_eq!(at(&below, in_own_pod()), in_pod(OTHER, None));
        assert_eq!(at("/system.slice/spdk.service", PRIVATE), NOTHING);
        let beside = format!("/../pod{UID}/{id}");
        assert_eq!(at(&beside, in_own_pod()), in_pod(OTHER, None));
        assert_eq!(at(&beside, PRIVATE), NOTHING);
    }

    #[test]
    fn the_unit_is_the_first_that_is_no_slice() {
        for (path, unit) in [
            ("/system.slice/spdk.service", "spdk.service"),
            ("/system.slice/spdk.service/sub.service", "spdk.service"),
            ("/a.slice/a-b.slice/vhost-0.service/x", "vhost-0.service"),
            (
                "/user.slice/user-1000.slice/user@1000.service/app.slice/spdk.service",
                "user@1000.service",
            ),
            (
                "/user.slice/user-0.slice/session-3.scope",
                "session-3.scope",
            ),
            ("/init.scope", "init.scope"),
            ("/system.slice/_cpu.service", "cpu.service"),
        ] {
            assert_eq!(at(path, ROOT), in_unit(unit), "{path}");
        }
        for path in [
            "/",
            "/system.slice",
            "/x/spdk.service",
            "/system.slice/x/spdk.service",
            "/.service",
            "/../system.slice/spdk.service",
        ] {
            assert_eq!(at(path, ROOT), NOTHING, "{path}");
        }
    }

    #[test]
    fn version_1_says_the_same_by_several_lines() {
        let id = id();
        let path = format!("/kubepods/burstable/pod{UID}/{id}");
        let hybrid = format!("9:name=systemd:{path}\n4:memory:{path}\n2:cpu,cpuacct:/\n0::/\n");
        assert_eq!(Placement::read(&hybrid, ROOT), in_pod(UID, Some(&id)));
        // Containers stay in the runtime's unit of the version 2 that nobody uses.
        let left = format!(
            "4:memory:{path}\n1:name=systemd:{path}\n0::/system.slice/containerd.service\n"
        );
        assert_eq!(Placement::read(&left, ROOT), in_pod(UID, Some(&id)));
        let unit = "9:name=systemd:/system.slice/spdk.service\n4:memory:/system.slice\n0::/\n";
        assert_eq!(Placement::read(unit, ROOT), in_unit("spdk.service"));
        let colon = "9:name=systemd:/system.slice/spdk:0.service\n";
        assert_eq!(Placement::read(colon, ROOT), in_unit("spdk:0.service"));
    }

    #[test]
    fn lines_that_name_different_pods_say_nothing() {
        let id = id();
        let two = format!("4:memory:/kubepods/pod{UID}/{id}\n0::/kubepods/pod{OTHER}/{id}\n");
        assert_eq!(Placement::read(&two, ROOT), None);
        let astray = format!("4:memory:/kubepods/pod{UID}/{id}\n0::/kubepods/burstable\n");
        assert_eq!(Placement::read(&astray, ROOT), None);
        let containers = format!("4:memory:/kubepods/pod{UID}/{id}\n0::/kubepods/pod{UID}/x\n");
        assert_eq!(Placement::read(&containers, ROOT), in_pod(UID, Some(&id)));
        let units = "9:name=systemd:/system.slice/a.service\n0::/system.slice/b.service\n";
        assert_eq!(Placement::read(units, ROOT), NOTHING);
    }

    #[test]
    fn a_hierarchy_that_nobody_uses_does_not_put_everybody_into_our_pod() {
        let id = id();
        let elsewhere = format!("4:memory:/../../pod{UID}/{id}\n0::/\n");
        assert_eq!(
            Placement::read(&elsewhere, in_own_pod()),
            in_pod(UID, Some(&id))
        );
        let host = "4:memory:/../../../../system.slice/x.service\n0::/\n";
        assert_eq!(Placement::read(host, in_own_pod()), NOTHING);
        assert_eq!(
            Placement::read("4:memory:/\n0::/\n", in_own_pod()),
            in_pod(OTHER, None)
        );
    }

    #[test]
    fn only_a_namespace_that_begins_at_our_own_cgroup_is_private() {
        let own = |is_initial, cgroups| Vantage::new(is_initial, cgroups, "").is_private;
        assert!(own(false, "0::/\n") && own(false, "4:memory:/\n0::/\n"));
        // The machine's own root; a system in a container with units of its own.
        assert!(!own(true, "0::/\n"));
        assert!(!own(false, "0::/system.slice/domaind.service\n"));
        assert_eq!(Vantage::new(false, "0::/\n", UID).own_pod, Some(uid(UID)));
        assert_eq!(Vantage::new(false, "0::/\n", "my-pod").own_pod, None);
    }

    #[test]
    fn groups_are_those_of_who_connected_or_none() {
        let status = "Name:\tx\nUid:\t5\t1000\t5\t5\nGid:\t6\t100\t6\t6\nGroups:\t4242 7 \n";
        assert_eq!(groups(status, 1000, 100), [4242, 7]);
        assert!(groups(status, 5, 100).is_empty());
        assert!(groups(status, 1000, 6).is_empty());
        assert!(groups("Groups:\t1\n", 1000, 100).is_empty());
        assert!(groups("Uid:\t1 1 1 1\nGid:\t1 1 1 1\nGroups:\t\n", 1, 1).is_empty());
    }

    #[test]
    fn of_this_process_it_can_be_said() {
        let pid = rustix::process::getpid().as_raw_nonzero().get();
        let (uid, gid) = (
            rustix::process::geteuid().as_raw(),
            rustix::process::getegid().as_raw(),
        );
        let own = Placement::of(pid, uid, gid).unwrap();
        let groups = rustix::process::getgroups().unwrap();
        assert_eq!(own.groups.len(), groups.len());
        assert_eq!(Placement::of(0, uid, gid), None);
    }
}
