"""One pod on the node: its sandbox, its containers in order, their probes, restarts
and end. A thread of its own does what a kubelet's pod worker does."""

from __future__ import annotations

import threading
import time
import traceback
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import grpc

from . import cgroups, convert, probes
from .cri import Runtime, api
from .spec import Container, Identity, Pod
from .volumes import Volumes

TURN_S = 0.1
# A kubelet begins with ten seconds, and doubles.
RESTART_AFTER_S = 0.3


@dataclass
class Running:
    """A container of the pod, over its restarts."""

    spec: Container
    id: str = ""
    attempt: int = 0
    started: bool = False
    ready: bool = False
    exit_codes: list[int] = field(default_factory=list)
    #: Every id it has had, the last one last.
    ids: list[str] = field(default_factory=list)
    asked: dict[str, int] = field(default_factory=dict)
    watches: dict[str, probes.Watch] = field(default_factory=dict)
    restart_at: float | None = None
    #: Killed by the liveness or startup probe.
    killed_by_probe: list[str] = field(default_factory=list)

    @property
    def runs(self) -> bool:
        return bool(self.id)

    @property
    def completed(self) -> bool:
        return not self.runs and bool(self.exit_codes) and self.exit_codes[-1] == 0


class PodFailed(Exception):
    """What stops the pod's worker for good."""


class RunningPod:
    """A pod from its first directory to its last cgroup."""

    def __init__(
        self,
        runtime: Runtime,
        spec: Pod,
        identity: Identity,
        image_ids: dict[str, str],
        volumes: Volumes,
        log_dir: Path,
    ) -> None:
        self.spec = spec
        self.identity = identity
        self.volumes = volumes
        self.cgroup = spec.cgroup(identity.uid)
        self._runtime = runtime
        self._image_ids = image_ids
        self._log_dir = log_dir
        self._sandbox = ""
        self._config = convert.sandbox(spec, identity, log_dir)
        self._by_name = {one.name: Running(one) for one in spec.every_container()}
        self._initialised = False
        self._lock = threading.RLock()
        self._stopping = threading.Event()
        self._failure: str | None = None
        self._worker = threading.Thread(target=self._work, name=f"pod {spec.name}", daemon=True)

    def start(self) -> None:
        """Returns when there is a sandbox; the containers come by and by."""
        self._log_dir.mkdir(parents=True)
        cgroups.make_pod(self.cgroup, self.spec.memory_limit())
        self.volumes.make()
        self._sandbox = self._runtime.run_sandbox(self._config)
        self._worker.start()

    def container(self, name: str) -> Running:
        with self._lock:
            return self._by_name[name]

    def pid(self, name: str) -> int:
        """Of the container's first process, as the host sees it."""
        return self._runtime.pid(self.container(name).id)

    def container_cgroup(self, name: str) -> str:
        return f"{self.cgroup}/{self.container(name).id}"

    def run_in(self, name: str, command: list[str], limit_s: float = 20) -> tuple[int, str]:
        return self._runtime.run_in(self.container(name).id, command, limit_s)

    def is_ready(self) -> bool:
        with self._lock:
            self._check()
            regular = [self._by_name[one.name] for one in self.spec.containers]
            sidecars = [self._by_name[one.name] for one in self.spec.init_containers if one.is_sidecar]
            return self._initialised and all(one.runs and one.ready for one in regular + sidecars)

    def why_not_ready(self) -> str:
        with self._lock:
            parts = []
            for name, one in self._by_name.items():
                state = "runs" if one.runs else f"ended {one.exit_codes}"
                asked = {kind: watch.why for kind, watch in one.watches.items() if watch.why}
                parts.append(f"{name}: {state}, started {one.started}, ready {one.ready} {asked or ''}")
            return "; ".join(parts)

    def has_ended(self, name: str) -> bool:
        with self._lock:
            self._check()
            return not self._by_name[name].runs and bool(self._by_name[name].exit_codes)

    def log(self, name: str) -> str:
        """What all attempts of the container have written, both streams."""
        files = sorted((self._log_dir / name).glob("*.log"), key=lambda path: int(path.stem))
        return "".join(text_of(path) for path in files)

    def stop(self) -> dict[str, int]:
        """Ends it in order, within its grace period; the exit codes of what ran."""
        self._stopping.set()
        if self._worker.is_alive():
            self._worker.join()
        try:
            return self._stop_containers()
        finally:
            if self._sandbox:
                self._runtime.remove_sandbox(self._sandbox)
            self.volumes.remove()
            stuck = cgroups.remove(self.cgroup)
            if stuck:
                raise PodFailed(f"{self.spec.name}: cgroups that do not go: {stuck}")

    def _stop_containers(self) -> dict[str, int]:
        """All at once; sidecars after what they are there for, the last one first."""
        codes: dict[str, int] = {}
        threads = [threading.Thread(target=self._end, args=(one.name, codes)) for one in self.spec.containers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for one in reversed(self.spec.init_containers):
            self._end(one.name, codes)
        return codes

    def _end(self, name: str, codes: dict[str, int]) -> None:
        one = self._by_name[name]
        if one.runs:
            self._runtime.stop(one.id, self.spec.grace_s)
            codes[name] = self._runtime.status(one.id).exit_code
            one.exit_codes.append(codes[name])
            one.id = ""

    def _check(self) -> None:
        if self._failure is not None:
            raise PodFailed(f"pod {self.spec.name}: {self._failure}")

    def _work(self) -> None:
        try:
            while not self._stopping.wait(TURN_S):
                with self._lock:
                    self._turn()
        except grpc.RpcError as error:
            self._failure = f"the runtime: {error.details()}"
        except Exception:  # noqa: BLE001 - whoever asks for the pod has to hear of it
            self._failure = traceback.format_exc()

    def _turn(self) -> None:
        for one in self._by_name.values():
            if one.runs:
                self._look(one)
        if not self._initialised:
            self._initialised = self._initialise()
        if self._initialised:
            for spec in self.spec.containers:
                self._keep(self._by_name[spec.name], self.spec.restart_policy)

    def _initialise(self) -> bool:
        """One step of the init containers in their order; are all through?"""
        for spec in self.spec.init_containers:
            one = self._by_name[spec.name]
            if spec.is_sidecar:
                self._keep(one, "Always")
                if not one.started:
                    return False
            elif not one.completed:
                # A pod that never restarts has failed with its first init container.
                policy = "Always" if self.spec.restart_policy == "Always" else "OnFailure"
                self._keep(one, policy)
                return False
        return True

    def _keep(self, one: Running, policy: str) -> None:
        """Starts it for the first time, or again as the policy says."""
        if one.runs:
            return
        if one.exit_codes:
            again = policy == "Always" or (policy == "OnFailure" and one.exit_codes[-1] != 0)
            if one.spec in self.spec.init_containers and not one.spec.is_sidecar:
                again = one.exit_codes[-1] != 0 and policy != "Never"
            if not again:
                return
            if one.restart_at is None:
                one.restart_at = time.monotonic() + RESTART_AFTER_S
            if time.monotonic() < one.restart_at:
                return
            one.attempt += 1
        self._start(one)

    def _start(self, one: Running) -> None:
        (self._log_dir / one.spec.name).mkdir(exist_ok=True)
        image = self._image_ids.get(one.spec.image)
        if image is None:
            raise PodFailed(f"image {one.spec.image!r} was not imported; there are {sorted(self._image_ids)}")
        mounts = self.volumes.mounts(one.spec)
        config = convert.container(self.spec, one.spec, self.identity, image, one.attempt, mounts)
        one.id = self._runtime.create(self._sandbox, config, self._config)
        one.ids.append(one.id)
        one.restart_at = None
        self._runtime.start(one.id)
        one.started = one.spec.startup is None
        one.ready = one.started and one.spec.readiness is None
        kinds = {"startup": one.spec.startup, "liveness": one.spec.liveness, "readiness": one.spec.readiness}
        one.watches = {
            kind: probes.Watch(probe, partial(probes.ask, self._runtime, one.id, one.spec))
            for kind, probe in kinds.items()
            if probe is not None
        }

    def _look(self, one: Running) -> None:
        status = self._runtime.status(one.id)
        if status.state == api.CONTAINER_EXITED:
            one.exit_codes.append(status.exit_code)
            one.id, one.started, one.ready = "", False, False
            return
        if not one.started:
            self._begin(one, self._ask(one, "startup"))
            return
        if self._ask(one, "liveness") is False:
            self._kill(one, "liveness")
            return
        if "readiness" in one.watches:
            answer = self._ask(one, "readiness")
            one.ready = one.ready if answer is None else answer

    def _begin(self, one: Running, answer: bool | None) -> None:
        if answer is True:
            one.started = True
            one.ready = one.spec.readiness is None
        elif answer is False:
            self._kill(one, "startup")

    def _ask(self, one: Running, kind: str) -> bool | None:
        watch = one.watches.get(kind)
        if watch is None:
            return None
        answer = watch.turn()
        one.asked[kind] = one.asked.get(kind, 0) + (answer is True)
        return answer

    def _kill(self, one: Running, kind: str) -> None:
        one.killed_by_probe.append(f"{kind}: {one.watches[kind].why}")
        self._runtime.stop(one.id, self.spec.grace_s)


def text_of(path: Path) -> str:
    """Without what the runtime puts before each line: time, stream, full or partial."""
    text = []
    for line in path.read_text(errors="replace").splitlines():
        _, _, tag, rest = line.split(" ", 3)
        text.append(rest + ("\n" if tag == "F" else ""))
    return "".join(text)
