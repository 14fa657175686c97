"""The node: a containerd, images, config maps, and the pods that run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from . import cgroups, images
from .containerd import Containerd
from .pod import RunningPod
from .spec import Identity, Pod
from .volumes import Volumes

PAUSE_IMAGE = "localhost/pause:1"


class Node:
    """To be closed, whatever happened."""

    def __init__(self, home: Path, host_prefixes: dict[str, Path], pause: Path) -> None:
        self.home = home
        self.host_prefixes = host_prefixes
        self.config_maps: dict[str, dict[str, str]] = {}
        self._image_ids: dict[str, str] = {}
        self._pods: list[RunningPod] = []
        self._started = 0
        self._containerd = Containerd(home, PAUSE_IMAGE)
        try:
            self._runtime = self._containerd.connect()
            archive = home / "pause.tar"
            images.make(archive, PAUSE_IMAGE, {"/pause": pause}, ["/pause"])
            self.add_image(archive, PAUSE_IMAGE)
        except BaseException:
            # Nobody has this node yet, to close it.
            self._containerd.stop()
            raise

    def version(self) -> str:
        return self._runtime.version()

    def add_image(self, archive: Path, *names: str) -> None:
        """Imports it; pods know it by these names."""
        self._containerd.import_image(archive)
        image_id = images.image_id(archive)
        deadline = time.monotonic() + 10
        while not self._runtime.has_image(image_id):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{archive}: the runtime does not know {image_id}")
            time.sleep(0.05)
        for name in names:
            self._image_ids[name] = image_id

    def apply(self, manifests: list[dict[str, Any]]) -> None:
        """What pods may refer to."""
        for manifest in manifests:
            if manifest["kind"] == "ConfigMap":
                self.config_maps[manifest["metadata"]["name"]] = manifest.get("data") or {}

    def run(self, manifest: dict[str, Any], uid: str) -> RunningPod:
        """Starts a pod of this manifest under a uid."""
        spec = Pod.read(manifest)
        number, self._started = self._started, self._started + 1
        directory = self.home / "pods" / f"{number}"
        volumes = Volumes(spec, directory, self.config_maps, self.host_prefixes)
        logs = self.home / "logs" / f"{number}-{spec.name}"
        pod = RunningPod(self._runtime, spec, Identity(uid, "node-0"), self._image_ids, volumes, logs)
        self._pods.append(pod)
        pod.start()
        return pod

    def stop(self, pod: RunningPod) -> dict[str, int]:
        codes = pod.stop()
        self._pods.remove(pod)
        return codes

    def logs(self) -> dict[str, str]:
        """All logs, of pods that have ended, too."""
        files = sorted((self.home / "logs").glob("*/*/*.log"))
        return {str(file.relative_to(self.home / "logs")): file.read_text(errors="replace") for file in files}

    def close(self) -> list[str]:
        """Ends everything; answers what went wrong with that."""
        trouble = []
        for pod in list(self._pods):
            try:
                pod.stop()
            except Exception as error:  # noqa: BLE001 - the others have to go all the same
                trouble.append(f"{pod.spec.name}: {error}")
        try:
            for sandbox in self._runtime.sandboxes():
                trouble.append(f"sandbox {sandbox} was left")
                self._runtime.remove_sandbox(sandbox)
        except Exception as error:  # noqa: BLE001
            trouble.append(f"{error}")
        self._runtime.close()
        self._containerd.stop()
        trouble += [f"cgroup {path} is left" for path in cgroups.remove("/kubepods") if path.is_dir()]
        return trouble
