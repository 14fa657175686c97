"""The DaemonSet's pod by itself: how it starts, as whom it runs, and how it ends."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

from chart import Chart, only_init
from minikubelet import cgroups
from stage import Stage, expect, until_ended, until_ready, wait

DAEMON_ID, CLIENT_GID = 65532, 4242
UID_PREPARE = "0d000000-0000-4000-8000-000000000009"
UID_TEST = "0d000000-0000-4000-8000-000000000008"
UID_WITHOUT_HTTP = "0d000000-0000-4000-8000-000000000007"


def prepared(stage: Stage) -> str:
    """`prepare-dir` has made a fresh root:root 0755 directory the daemon's, and leaves it so."""
    expect(stage.daemon.container("prepare-dir").exit_codes == [0], stage.daemon.log("prepare-dir"))
    check_directories(stage.run)
    before = listing(stage.run)
    again = stage.node.run(only_init(stage.chart.one("DaemonSet"), "prepare-again"), UID_PREPARE)
    code, log = until_ended(again, "prepare-dir")
    stage.node.stop(again)
    expect(code == 0, f"on its own result it ends with {code}: {log}")
    check_directories(stage.run)
    expect(listing(stage.run) == before, f"it changed {before} to {listing(stage.run)}")
    expect(stage.daemon.is_ready(), "the daemon suffered from it")
    return "root:root 0755 became 0755/0750/0700 of 65532; again, beside the daemon: nothing changed"


def check_directories(run: Path) -> None:
    for path, mode, gid in (
        (run, 0o755, DAEMON_ID),
        (run / "public", 0o750, CLIENT_GID),
        (run / "admin", 0o700, DAEMON_ID),
    ):
        found = path.stat()
        is_so = (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (mode, DAEMON_ID, gid)
        expect(is_so, f"{path}: {found.st_mode:o} {found.st_uid}:{found.st_gid}, not {mode:o} {DAEMON_ID}:{gid}")


def listing(run: Path) -> list[tuple[str, int, int, int, int]]:
    found = sorted(run.rglob("*"))
    facts = [(path, path.lstat()) for path in found]
    return [(str(path), at.st_mode, at.st_uid, at.st_gid, at.st_ino) for path, at in facts]


def confined(stage: Stage) -> str:
    """It runs as nobody special, and could not become so."""
    pid = stage.daemon.pid("domaind")
    status = proc_status(pid)
    expect(set(status["Uid"].split()) == {str(DAEMON_ID)}, f"Uid {status['Uid']}")
    expect(set(status["Gid"].split()) == {str(DAEMON_ID)}, f"Gid {status['Gid']}")
    expect(str(CLIENT_GID) in status["Groups"].split(), f"Groups {status['Groups']}")
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        expect(int(status[name], 16) == 0, f"{name} {status[name]}")
    expect(status["NoNewPrivs"] == "1", f"NoNewPrivs {status['NoNewPrivs']}")
    expect(status["Seccomp"] == "2", f"Seccomp {status['Seccomp']}")
    root = mount_options(pid, "/")
    expect("ro" in root, f"its root file system is mounted {root}")
    expect("ro" in mount_options(pid, "/etc/domaind"), "its configuration can be written to")
    same = os.readlink(f"/proc/{pid}/ns/pid") == os.readlink("/proc/self/ns/pid")
    expect(same, "hostPID is not so")
    cgroup = cgroups.of_process(pid)
    expect(cgroup == stage.daemon.container_cgroup("domaind"), f"its cgroup is {cgroup}")
    limit = cgroups.limit_bytes(cgroup)
    wanted = stage.daemon.spec.containers[0].resources.memory_limit
    expect(limit == wanted, f"its limit is {limit}, not {wanted}")
    return f"uid 65532, no capabilities, seccomp 2, root read-only, hostPID, limit {limit >> 20} MiB in {cgroup[:60]}…"


def asked(stage: Stage) -> str:
    """All its probes are really asked, and say yes."""
    daemon = stage.daemon.container("domaind")
    wait(f"all of {sorted(daemon.watches)} say yes", lambda: all(daemon.asked.get(kind) for kind in daemon.watches), 60)
    how = {kind: "http" if watch.probe.http_path else "exec" for kind, watch in daemon.watches.items()}
    expect(set(how) == {"startup", "liveness", "readiness"}, f"there are probes {sorted(how)}")
    expect(daemon.killed_by_probe == [], f"{daemon.killed_by_probe}")
    return ", ".join(f"{kind} by {way}" for kind, way in how.items())


def test_pod(stage: Stage) -> str:
    """What `helm test` runs on the node: from a client's place the daemon answers."""
    pod = stage.node.run(stage.chart.one("Pod", "-test"), UID_TEST)
    code, log = until_ended(pod, pod.spec.containers[0].name, 60)
    stage.node.stop(pod)
    expect(code == 0, f"it ended with {code}: {log}")
    return f"exit 0: {' '.join(log.split())}"


def without_http(stage: Stage, chart: Chart) -> str:
    """With metrics off all probes are commands, and it becomes ready by them, and stops."""
    stage.node.apply(chart.manifests)
    stage.daemon = stage.node.run(chart.one("DaemonSet"), UID_WITHOUT_HTTP)
    until_ready(stage.daemon)
    said = asked(stage)
    expect("http" not in said, said)
    return f"{said}; {stops(stage)}"


def stops(stage: Stage) -> str:
    """SIGTERM ends it in order, and it leaves nothing."""
    grace = stage.daemon.spec.grace_s
    started = time.monotonic()
    codes = stage.node.stop(stage.daemon)
    took = time.monotonic() - started
    expect(codes == {"domaind": 0}, f"exit codes {codes}: {stage.daemon.log('domaind')[-2000:]}")
    expect(took < grace, f"it took {took:.1f} of {grace} s")
    sockets = [path for path in stage.run.rglob("*") if path.is_socket()]
    expect(sockets == [], f"left behind: {sockets}")
    expect(cgroups.left(stage.daemon.cgroup) == [], "its cgroup is left")
    return f"exit 0 after {took:.1f} of {grace} s, no socket and no cgroup left"


def proc_status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def mount_options(pid: int, point: str) -> list[str]:
    """Of the mount that is seen there, which is the last one."""
    lines = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
    found = [fields for fields in (line.split() for line in lines) if fields[4] == point]
    return found[-1][5].split(",") if found else []
