"""A daemon whose cgroup is smaller than what it is asked for."""

from __future__ import annotations

import re
from pathlib import Path

from chart import Chart, variant
from minikubelet import cgroups
from stage import Stage, expect, until_ready

UID = "0e000000-0000-4000-8000-000000000001"
QUOTA = 7
LIMIT_MIB = 64


def refuses_more_than_its_cgroup_has(stage: Stage) -> str:
    """128 MiB in 64: RESOURCE_EXHAUSTED, nobody is killed, and it goes on."""
    chart = Chart(stage.chart.manifests)
    # Without a limit of its own: what the cgroup has is what decides.
    chart.edit_config(lambda text: re.sub(r"^region_bytes = .*\n", "", text.split("[[domains]]")[0], flags=re.M))
    stage.node.apply([chart.one("ConfigMap")])
    pod = stage.node.run(small(chart), UID)
    until_ready(pod)
    stage.daemon = pod
    cgroup = pod.container_cgroup("domaind")
    expect(cgroups.limit_bytes(cgroup) == LIMIT_MIB << 20, f"limit {cgroups.limit_bytes(cgroup)}")
    code, said = stage.ctl("-v", "create", "domain", "large", "--bounce", "128MiB", "--coherent", "0")
    expect(code == QUOTA and "code: RESOURCE_EXHAUSTED" in said, f"{code}: {said}")
    code, small_one = stage.ctl("create", "domain", "fits", "--bounce", "8MiB", "--coherent", "0")
    expect(code == 0, f"8 MiB: {small_one}")
    code, health = stage.ctl("health")
    expect(code == 0 and pod.is_ready(), f"health: {health}")
    expect(pod.container("domaind").exit_codes == [], "it was started again")
    kills = {str(path): kills_at(path) for path in every_cgroup()}
    expect(sum(kills.values()) == 0, f"OOM kills: {kills}")
    used = cgroups.usage_bytes(cgroup) >> 20
    error = next(line for line in said.splitlines() if line.startswith("error: ")).removeprefix("error: ")
    return f"{error}; 8 MiB went, {used} of {LIMIT_MIB} MiB used, 0 OOM kills in {len(kills)} cgroups"


def small(chart: Chart) -> dict[str, object]:
    return variant(chart.one("DaemonSet"), "small-domaind", memory=f"{LIMIT_MIB}Mi")


def every_cgroup() -> list[Path]:
    top = cgroups.memory_root() / "kubepods"
    return [path for path in [top, *top.rglob("*")] if path.is_dir()]


def kills_at(path: Path) -> int:
    return cgroups.oom_kills(str(path.relative_to(cgroups.memory_root())))
