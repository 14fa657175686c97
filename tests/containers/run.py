"""Runs all checks in their order and says of each what it saw; see containers.sh."""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from chart import Chart, load
from checks import budget, daemon, kubelet, refusals, sharing, sidecar
from minikubelet import images
from minikubelet.node import Node
from stage import RUN, Stage, expect, free_port, is_taken, until_ready

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "helm/domaind/examples"
METRICS_PORT = 9464
ORPHANS_LIMIT_S = 5
UID_DAEMON = "0d000000-0000-4000-8000-000000000001"
UID_DRIVER = "0a000000-0000-4000-8000-000000000001"
UID_DEVICE = "0a000000-0000-4000-8000-000000000002"

# What the checks need beside what the example has, as an operator would add it.
MORE_CONFIG = f"""
[[policy.rules]]
name = "big-driver"
uids = [{sharing.BIG_DRIVER}]
domains = ["{sharing.BIG}"]
roles = ["driver"]

[[policy.rules]]
name = "big-device"
uids = [{sharing.BIG_DEVICE}]
domains = ["{sharing.BIG}"]
roles = ["device"]

[[policy.rules]]
name = "bound"
uids = [{refusals.BOUND_USER}]
pod_uids = ["{refusals.BOUND_POD}"]
domains = ["{refusals.BOUND}"]

[[domains]]
name = "{sharing.BIG}"
bounce_bytes = {sharing.BIG_BYTES}
coherent_bytes = 1048576

[[domains]]
name = "{refusals.BOUND}"
bounce_bytes = 1048576
coherent_bytes = 1048576
"""


class Report:
    """One line for each check."""

    def __init__(self) -> None:
        self._number = 0
        self._started = time.monotonic()

    def check(self, name: str, look: Callable[[], str]) -> None:
        self._number += 1
        saw = look()
        print(f"ok {self._number:2} [{self.seconds():5.1f}s] {name}: {saw}", flush=True)

    def seconds(self) -> float:
        return time.monotonic() - self._started

    def summary(self) -> None:
        print(f"containers: {self._number} checks passed in {self.seconds():.0f} s", flush=True)


def main() -> int:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--image", type=Path, required=True)
    arguments.add_argument("--programs", type=Path, required=True)
    args = arguments.parse_args()
    # Whoever stops us wants everything taken down, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    adopt_orphans()
    # Short: sockets lie below it.
    home = Path(tempfile.mkdtemp(prefix="dk-", dir="/tmp"))
    report, trouble = Report(), []
    node = None
    try:
        node = Node(home, {RUN: home / "run"}, args.programs / "pause")
        check_all(node, home, args, report)
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - all is told, and then taken down
        trouble.append("interrupted" if isinstance(error, KeyboardInterrupt) else f"{error}")
        traceback.print_exc()
        tell_logs(node)
    finally:
        trouble += take_down(node, home)
    for line in trouble:
        print(f"not ok: {line}", file=sys.stderr)
    if trouble:
        return 1
    report.check("nothing is left", lambda: "no process, mount, cgroup, sandbox or file")
    report.summary()
    return 0


def check_all(node: Node, home: Path, args: argparse.Namespace, report: Report) -> None:
    print(f"containers: {node.version()}; {RUN} of the pods is {home}/run", flush=True)
    chart = Chart(load(EXAMPLES / "client-example/rendered"))
    metrics_off = Chart(load(EXAMPLES / "metrics-off/rendered"))
    example = Chart(load(EXAMPLES / "sidecar"))
    report.check("0 the mini-kubelet is strict", lambda: kubelet.is_strict([chart, metrics_off, example]))
    node.add_image(args.image, *chart.images(), *metrics_off.images(), *example.images())
    intruder = home / "intruder.tar"
    images.make(intruder, refusals.INTRUDER_IMAGE, {"/intruder": args.programs / "intruder"}, ["/intruder"])
    node.add_image(intruder, refusals.INTRUDER_IMAGE)
    if is_taken(METRICS_PORT):
        port = free_port()
        print(f"containers: port {METRICS_PORT} is taken here, the pods use {port}", flush=True)
        chart.move_port(METRICS_PORT, port)
    chart.edit_config(lambda text: text + MORE_CONFIG)
    node.apply(chart.manifests)

    stage = start(node, chart, home / "run")
    report.check("1 the daemon is confined", lambda: daemon.confined(stage))
    report.check("10 prepare-dir", lambda: daemon.prepared(stage))
    report.check("2 two pods share a domain", lambda: sharing.bytes_verified(stage))
    report.check("1 the daemon's probes", lambda: daemon.asked(stage))
    report.check("12 the chart's test pod", lambda: daemon.test_pod(stage))
    report.check("3 identity of pods", lambda: sharing.identity(stage))
    report.check("4 a pod without a rule", lambda: refusals.strangers(stage))
    report.check("4 another pod of the same user", lambda: refusals.pods_of_one_user(stage))
    report.check("4 a device is no driver", lambda: refusals.wrong_role(stage))
    report.check("13 reload", lambda: refusals.reload_lets_in(stage))
    report.check("11 an intruder in a client's place", lambda: refusals.intruder(stage))
    report.check("5 the daemon is killed", lambda: sharing.survives_a_kill(stage))
    report.check("6 who pays", lambda: sharing.who_pays(stage))
    report.check("2 clients stop", lambda: clients_stop(stage))
    report.check("9 the daemon stops", lambda: daemon.stops(stage))
    report.check("7 budget", lambda: budget.refuses_more_than_its_cgroup_has(stage))
    report.check("9 the small daemon stops", lambda: daemon.stops(stage))
    report.check("1 probes without HTTP", lambda: daemon.without_http(stage, metrics_off))
    report.check("8 sidecar", lambda: sidecar.serves_its_pod(stage, example))


def start(node: Node, chart: Chart, run: Path) -> Stage:
    """The daemon first: the clients' volume wants its directory."""
    pod = node.run(chart.one("DaemonSet"), UID_DAEMON)
    until_ready(pod)
    driver = node.run(chart.one("Deployment", "-driver"), UID_DRIVER)
    device = node.run(chart.one("Deployment", "-device"), UID_DEVICE)
    args = device.spec.containers[0].args
    return Stage(node, chart, run, pod, driver, device, args[args.index("--domain") + 1])


def clients_stop(stage: Stage) -> str:
    """Told to stop, both say so and end well, within their grace period."""
    started = time.monotonic()
    codes = stage.node.stop(stage.driver) | stage.node.stop(stage.device)
    expect(codes == {"driver": 0, "device": 0}, f"exit codes {codes}")
    for pod, name in ((stage.driver, "driver"), (stage.device, "device")):
        expect(pod.log(name).endswith("stopped\n"), pod.log(name)[-500:])
    return f"exit 0 and 0, together after {time.monotonic() - started:.1f} s"


def tell_logs(node: Node | None) -> None:
    for name, text in (node.logs() if node else {}).items():
        print(f"--- {name}", *text.splitlines()[-40:], sep="\n", file=sys.stderr)


def take_down(node: Node | None, home: Path) -> list[str]:
    """Whatever is left afterwards is trouble."""
    trouble = node.close() if node else []
    trouble += never_ending()
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    trouble += [f"{mount} is still mounted" for mount in mounts if mount.startswith(f"{home}/")]
    trouble += [f"process {pid} still uses {home}" for pid in users_of(home)]
    if not trouble:
        shutil.rmtree(home)
    return trouble


def adopt_orphans() -> None:
    """Shims outlive whoever starts them: they shall be ours to wait for, not process 1's."""
    set_child_subreaper = 36
    if ctypes.CDLL(None, use_errno=True).prctl(set_child_subreaper, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def never_ending() -> list[str]:
    """Waits for all that was started here or came to us; answers what does not end."""
    deadline = time.monotonic() + ORPHANS_LIMIT_S
    while time.monotonic() < deadline:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return []
        if pid == 0:
            time.sleep(0.05)
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [f"process {pid} is left: {Path(f'/proc/{pid}/comm').read_text().strip()}" for pid in children]


def users_of(home: Path) -> list[str]:
    """Shims and what they started have the directory in their command lines."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if any(word.startswith(f"{home}/".encode()) for word in words):
            found.append(path.parent.name)
    return found


if __name__ == "__main__":
    sys.exit(main())
