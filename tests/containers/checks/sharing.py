"""Two data-plane pods that share a domain: bytes, identity, memory, and a daemon that
goes away under them."""

from __future__ import annotations

import os
import re
import signal

from chart import variant
from checks.daemon import mount_options, proc_status
from minikubelet import cgroups
from minikubelet.pod import RunningPod
from stage import RUN, Stage, expect, until_logged, until_ready, wait

MIB = 1 << 20
UID_BIG_DRIVER = "0b000000-0000-4000-8000-000000000001"
UID_BIG_DEVICE = "0b000000-0000-4000-8000-000000000002"
#: Domain and users of the memory check; `run.py` declares them.
BIG, BIG_DRIVER, BIG_DEVICE = "big", 20_001, 20_002
BIG_BYTES = 128 * MIB


def passes(pod: RunningPod) -> int:
    return len(re.findall(r"^pass \d+: \d+ bytes", pod.log("driver"), re.M))


def served(pod: RunningPod) -> int:
    return len(re.findall(r"^\d+ bytes, \d+ blocks so far, each as", pod.log("device"), re.M))


def bytes_verified(stage: Stage) -> str:
    """Both sides, of two users, say that every byte was right."""
    until_ready(stage.driver)
    until_ready(stage.device)
    uids = []
    for pod, name in ((stage.driver, "driver"), (stage.device, "device")):
        pid = pod.pid(name)
        status = proc_status(pid)
        uids.append(status["Uid"].split()[0])
        expect(int(status["CapEff"], 16) == 0 and status["Seccomp"] == "2", f"{name}: {status}")
        expect("ro" in mount_options(pid, f"{RUN}/public"), f"{name} has the directory writable")
        limit = cgroups.limit_bytes(pod.container_cgroup(name))
        expect(limit == pod.spec.containers[0].resources.memory_limit, f"{name}: limit {limit}")
    expect(len(set(uids)) == 2 and "0" not in uids, f"uids {uids}")
    wait("the driver has passed its file twice", lambda: passes(stage.driver) >= 2, 40)
    wait("the device has checked blocks", lambda: served(stage.device) >= 1)
    last = [line for line in stage.driver.log("driver").splitlines() if line.startswith("pass ")][-1]
    return f"uids {' and '.join(uids)}; driver: {last}"


def identity(stage: Stage) -> str:
    """The daemon knows which pods and containers they are, and says so in its audit lines."""
    sessions = stage.ctl_json("get", "sessions")["sessions"]
    seen = {one["peer"].get("podUid"): one for one in sessions}
    parts = []
    for pod, name in ((stage.driver, "driver"), (stage.device, "device")):
        expect(pod.identity.uid in seen, f"no session of pod {pod.identity.uid}: {sessions}")
        session = seen[pod.identity.uid]
        container = pod.container(name).id
        expect(session["peer"].get("containerId") == container, f"{session['peer']}, not container {container}")
        expect(session["peer"]["uid"] == pod.spec.containers[0].security.run_as_user, f"{session['peer']}")
        granted = stage.audit(
            event="attach", result="granted", pod_uid=pod.identity.uid, container_id=container, domain=stage.domain
        )
        expect(granted != [], f"no audit line for {name}: {stage.audit()}")
        expect(bool(granted[-1].get("rule")), f"no rule in {granted[-1]}")
        parts.append(f"{name} {pod.identity.uid[:8]}…/{container[:12]} by rule {granted[-1]['rule']}")
    code, wide = stage.ctl("get", "sessions", "-o", "wide")
    expect(code == 0 and stage.driver.container("driver").id[:12] in wide, f"-o wide: {wide}")
    return "; ".join(parts)


def survives_a_kill(stage: Stage) -> str:
    """The daemon is killed: clients hear of it, attach anew, and go on."""
    before = passes(stage.driver), served(stage.device)
    restarts = stage.daemon.container("domaind").attempt
    os.kill(stage.daemon.pid("domaind"), signal.SIGKILL)
    clients = ((stage.driver, "driver"), (stage.device, "device"))
    said = [until_logged(pod, name, r"^lost: .*; trying again$").group(0) for pod, name in clients]
    wait("the daemon was started again", lambda: stage.daemon.container("domaind").attempt == restarts + 1)
    until_ready(stage.daemon)
    domains = [one["name"] for one in stage.ctl_json("get", "domains")["domains"]]
    expect(f"domains/{stage.domain}" in domains, f"declared domains after the restart: {domains}")
    for pod, name in clients:
        until_logged(pod, name, r"^attached to ", times=2)
        expect(pod.container(name).exit_codes == [], f"{name} was started again: {pod.log(name)}")
    wait("bytes flow again", lambda: passes(stage.driver) > before[0] and served(stage.device) > before[1], 40)
    codes = stage.daemon.container("domaind").exit_codes
    expect(codes == [128 + signal.SIGKILL], f"the daemon ended with {codes}")
    return f'daemon {codes[-1]}, started again; driver: "{said[0]}"; both attached anew in the same containers'


def who_pays(stage: Stage) -> str:
    """Clients of 64 MiB touch 128 MiB each: the daemon pays."""
    demo = ["demo", "--domain", BIG, "--touch", "--repeat", "--wait", "0", "--role"]
    pods = []
    for name, user, uid, last in (
        ("driver", BIG_DRIVER, UID_BIG_DRIVER, ["/usr/bin/domaind"]),
        ("device", BIG_DEVICE, UID_BIG_DEVICE, []),
    ):
        manifest = variant(
            stage.chart.one("Deployment", f"-{name}"),
            f"big-{name}",
            args=[*demo, name, *last],
            user=user,
            memory="64Mi",
        )
        pods.append((name, stage.node.run(manifest, uid)))
    for name, pod in pods:
        touched = until_logged(pod, name, r"^touched (\d+) bytes")
        expect(int(touched.group(1)) >= BIG_BYTES - 4096, f"{name}: {touched.group(0)}")
    driver = pods[0][1]
    wait("and moved bytes", lambda: passes(driver) >= 1, 30)
    used = {}
    for name, pod in pods:
        used[name] = cgroups.usage_bytes(pod.container_cgroup(name)) / MIB
        kills = cgroups.oom_kills(pod.container_cgroup(name))
        expect(kills == 0 and pod.container(name).exit_codes == [], f"{name}: {kills} OOM kills, {pod.log(name)}")
        expect(used[name] < 64, f"{name} pays for {used[name]:.1f} MiB")
    daemon = cgroups.usage_bytes(stage.daemon.container_cgroup("domaind")) / MIB
    expect(daemon > 128, f"the daemon pays for {daemon:.1f} MiB only")
    for _, pod in pods:
        codes = stage.node.stop(pod)
        expect(set(codes.values()) == {0}, f"told to stop, they end with {codes}")
    return (
        f"driver {used['driver']:.1f} MiB, device {used['device']:.1f} MiB of 64; daemon {daemon:.1f} MiB; no OOM kill"
    )
