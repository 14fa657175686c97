"""The container runtime interface, as far as a kubelet needs it here."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import grpc

# Made by tests/containers.sh from the protos of a crate.
sys.path.insert(0, os.environ["CRI_STUBS"])

from cri import v1_pb2 as api  # noqa: E402
from cri import v1_pb2_grpc as services  # noqa: E402

CALL_LIMIT_S = 60.0

__all__ = ["Runtime", "api"]


class Runtime:
    """One connection to containerd."""

    def __init__(self, socket: Path) -> None:
        # Without an authority the server refuses: grpcio would send the socket's path, escaped.
        self._channel = grpc.insecure_channel(f"unix://{socket}", options=[("grpc.default_authority", "localhost")])
        self._runtime = services.RuntimeServiceStub(self._channel)
        self._images = services.ImageServiceStub(self._channel)

    def close(self) -> None:
        self._channel.close()

    def version(self) -> str:
        answer = self._runtime.Version(api.VersionRequest(), timeout=CALL_LIMIT_S, wait_for_ready=True)
        return f"{answer.runtime_name} {answer.runtime_version}, CRI {answer.runtime_api_version}"

    def has_image(self, image_id: str) -> bool:
        request = api.ImageStatusRequest(image=api.ImageSpec(image=image_id))
        return bool(self._images.ImageStatus(request, timeout=CALL_LIMIT_S).image.id)

    def run_sandbox(self, config: api.PodSandboxConfig) -> str:
        request = api.RunPodSandboxRequest(config=config)
        return str(self._runtime.RunPodSandbox(request, timeout=CALL_LIMIT_S).pod_sandbox_id)

    def remove_sandbox(self, sandbox: str) -> None:
        self._runtime.StopPodSandbox(api.StopPodSandboxRequest(pod_sandbox_id=sandbox), timeout=CALL_LIMIT_S)
        self._runtime.RemovePodSandbox(api.RemovePodSandboxRequest(pod_sandbox_id=sandbox), timeout=CALL_LIMIT_S)

    def sandboxes(self) -> list[str]:
        answer = self._runtime.ListPodSandbox(api.ListPodSandboxRequest(), timeout=CALL_LIMIT_S)
        return [sandbox.id for sandbox in answer.items]

    def create(self, sandbox: str, config: api.ContainerConfig, pod: api.PodSandboxConfig) -> str:
        request = api.CreateContainerRequest(pod_sandbox_id=sandbox, config=config, sandbox_config=pod)
        return str(self._runtime.CreateContainer(request, timeout=CALL_LIMIT_S).container_id)

    def start(self, container: str) -> None:
        self._runtime.StartContainer(api.StartContainerRequest(container_id=container), timeout=CALL_LIMIT_S)

    def stop(self, container: str, grace_s: int) -> None:
        """SIGTERM, and SIGKILL when the grace is over."""
        request = api.StopContainerRequest(container_id=container, timeout=grace_s)
        self._runtime.StopContainer(request, timeout=grace_s + CALL_LIMIT_S)

    def status(self, container: str) -> api.ContainerStatus:
        request = api.ContainerStatusRequest(container_id=container)
        return self._runtime.ContainerStatus(request, timeout=CALL_LIMIT_S).status

    def pid(self, container: str) -> int:
        """As the host sees it."""
        request = api.ContainerStatusRequest(container_id=container, verbose=True)
        info = self._runtime.ContainerStatus(request, timeout=CALL_LIMIT_S).info["info"]
        return int(json.loads(info)["pid"])

    def run_in(self, container: str, command: list[str], limit_s: float) -> tuple[int, str]:
        """Exit code, and both outputs together. grpc.RpcError when the limit is over."""
        request = api.ExecSyncRequest(container_id=container, cmd=command, timeout=max(1, int(limit_s)))
        answer = self._runtime.ExecSync(request, timeout=limit_s + 10)
        return answer.exit_code, (answer.stdout + answer.stderr).decode(errors="replace")
