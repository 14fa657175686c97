"""Asking containers how they are."""

from __future__ import annotations

import http.client
import time
from collections.abc import Callable

import grpc

from .cri import Runtime
from .spec import Container, Probe


def ask(runtime: Runtime, container: str, one: Container, probe: Probe) -> str | None:
    """Why the answer is no; `None` if it is yes."""
    if probe.command:
        return ask_inside(runtime, container, probe)
    return ask_over_http(one, probe)


def ask_inside(runtime: Runtime, container: str, probe: Probe) -> str | None:
    try:
        code, output = runtime.run_in(container, list(probe.command), probe.timeout_s)
    except grpc.RpcError as error:
        return f"{probe.command}: {error.details()}"
    return None if code == 0 else f"{probe.command} exited with {code}: {output.strip()}"


def ask_over_http(one: Container, probe: Probe) -> str | None:
    port = probe.http_port
    number = one.ports.get(port) if isinstance(port, str) else port
    if number is None:
        return f"{one.name} has no port {port!r}"
    connection = http.client.HTTPConnection("127.0.0.1", number, timeout=probe.timeout_s)
    try:
        connection.request("GET", probe.http_path or "/")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return f"GET :{number}{probe.http_path}: {error}"
    finally:
        connection.close()
    return None if 200 <= status < 400 else f"GET :{number}{probe.http_path}: {status}"


class Watch:
    """One probe of one container that runs: when to ask, and what the answers come to."""

    def __init__(self, probe: Probe, ask: Callable[[Probe], str | None]) -> None:
        self.probe = probe
        self._ask = ask
        self._due = time.monotonic() + probe.initial_delay_s
        self._yes = self._no = 0
        self.asked = 0
        self.why: str | None = "not asked yet"

    def turn(self) -> bool | None:
        """Asks if it is time. `True` or `False` when the thresholds say so."""
        if time.monotonic() < self._due:
            return None
        self._due = time.monotonic() + self.probe.period_s
        self.asked += 1
        self.why = self._ask(self.probe)
        if self.why is None:
            self._yes, self._no = self._yes + 1, 0
            return True if self._yes >= self.probe.success_threshold else None
        self._yes, self._no = 0, self._no + 1
        return False if self._no >= self.probe.failure_threshold else None
