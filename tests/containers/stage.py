"""What all checks share: the node, the chart, the pods that run on, and how to ask."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from chart import Chart
from minikubelet.node import Node
from minikubelet.pod import RunningPod

RUN = "/run/domaind"
CTL = "/usr/bin/domainctl"
T = TypeVar("T")


class Failed(Exception):
    """A promise that was not kept."""


@dataclass
class Stage:
    """The scene of a run. Pods that later checks need are set by earlier ones."""

    node: Node
    chart: Chart
    #: Where the pods' /run/domaind is on this machine.
    run: Path
    daemon: RunningPod
    driver: RunningPod
    device: RunningPod
    #: What the daemon's pod is called in other words: the domain of the example.
    domain: str

    def ctl(self, *line: str) -> tuple[int, str]:
        """The operator's command line, in the daemon's own container."""
        return self.daemon.run_in("domaind", [CTL, "--runtime-dir", RUN, "--admin", *line])

    def ctl_json(self, *line: str) -> Any:
        code, output = self.ctl(*line, "-o", "json")
        expect(code == 0, f"domainctl {line}: {code}: {output}")
        return json.loads(output)

    def audit(self, **wanted: str) -> list[dict[str, Any]]:
        """The audit lines that say so."""
        found = []
        for line in self.daemon.log("domaind").splitlines():
            fields = audit_fields(line)
            if fields is not None and all(str(fields.get(key)) == value for key, value in wanted.items()):
                found.append(fields)
        return found


def audit_fields(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    if entry.get("target") != "domaind::audit":
        return None
    fields = entry.get("fields") or {}
    return dict(fields) if isinstance(fields, dict) else None


def expect(so: bool, otherwise: str) -> None:
    if not so:
        raise Failed(otherwise)


def wait(what: str, look: Callable[[], T | None], limit_s: float = 30) -> T:
    """What `look` finds, as soon as it finds it."""
    deadline = time.monotonic() + limit_s
    while True:
        found = look()
        if found:
            return found
        if time.monotonic() > deadline:
            raise Failed(f"not within {limit_s} s: {what}")
        time.sleep(0.1)


def until_ready(pod: RunningPod, limit_s: float = 60) -> None:
    try:
        wait(f"{pod.spec.name} is ready", pod.is_ready, limit_s)
    except Failed as failed:
        raise Failed(f"{failed}: {pod.why_not_ready()}") from None


def until_ended(pod: RunningPod, container: str, limit_s: float = 30) -> tuple[int, str]:
    """Exit code and log of a container that is not started again."""
    wait(f"{pod.spec.name} has ended", lambda: pod.has_ended(container), limit_s)
    return pod.container(container).exit_codes[-1], pod.log(container)


def until_logged(pod: RunningPod, container: str, pattern: str, limit_s: float = 40, times: int = 1) -> re.Match[str]:
    """The match of a whole line's beginning, when there have been so many."""

    def look() -> re.Match[str] | None:
        found = list(re.finditer(pattern, pod.log(container), re.M))
        return found[times - 1] if len(found) >= times else None

    return wait(f"{pod.spec.name}/{container} logs {pattern!r}, {times} times", look, limit_s)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return True
    return False
