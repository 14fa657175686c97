"""What cgroups say of memory, on either version of them, and their end."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


def memory_root() -> Path:
    """The hierarchy that counts memory."""
    v1 = ROOT / "memory"
    return v1 if v1.is_dir() else ROOT


def is_v2() -> bool:
    return (memory_root() / "cgroup.controllers").exists()


def usage_bytes(cgroup: str) -> int:
    name = "memory.current" if is_v2() else "memory.usage_in_bytes"
    return int((memory_root() / cgroup.lstrip("/") / name).read_text())


def limit_bytes(cgroup: str) -> int:
    name = "memory.max" if is_v2() else "memory.limit_in_bytes"
    text = (memory_root() / cgroup.lstrip("/") / name).read_text().strip()
    return 2**63 if text == "max" else int(text)


def oom_kills(cgroup: str) -> int:
    """How often something was killed there, or below if the kernel counts so."""
    name = "memory.events" if is_v2() else "memory.oom_control"
    lines = (memory_root() / cgroup.lstrip("/") / name).read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.split()[0] == "oom_kill")


def make_pod(cgroup: str, memory_limit: int | None) -> None:
    """The pod's own, with the limit of its containers together."""
    path = memory_root() / cgroup.lstrip("/")
    path.mkdir(parents=True, exist_ok=True)
    if memory_limit is not None:
        name = "memory.max" if is_v2() else "memory.limit_in_bytes"
        (path / name).write_text(str(memory_limit))


def of_process(pid: int) -> str:
    """The path that counts its memory."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(",") or (is_v2() and controllers == ""):
            return path
    raise LookupError(f"process {pid} is in no cgroup that counts memory")


def hierarchies() -> list[Path]:
    if is_v2():
        return [ROOT]
    return sorted({path.resolve() for path in ROOT.iterdir() if path.is_dir()})


def left(cgroup: str) -> list[Path]:
    return [at / cgroup.lstrip("/") for at in hierarchies() if (at / cgroup.lstrip("/")).is_dir()]


def remove(cgroup: str) -> list[Path]:
    """Removes it and what is below it; answers what would not go."""
    stuck = []
    for top in left(cgroup):
        for directory, _, _ in os.walk(top, topdown=False):
            try:
                os.rmdir(directory)
            except OSError:
                stuck.append(Path(directory))
    return stuck
