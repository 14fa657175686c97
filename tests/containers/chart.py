"""The rendered manifests, and what a check may change of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]


def load(directory: Path) -> list[Manifest]:
    """All documents below a directory."""
    files = sorted(directory.rglob("*.yaml"))
    if not files:
        raise FileNotFoundError(f"no rendered manifests below {directory}")
    return [document for file in files for document in yaml.safe_load_all(file.read_text()) if document]


class Chart:
    """What one case of the chart renders to."""

    def __init__(self, manifests: list[Manifest]) -> None:
        self.manifests = copy.deepcopy(manifests)

    def one(self, kind: str, ending: str = "") -> Manifest:
        found = [one for one in self.manifests if one["kind"] == kind and one["metadata"]["name"].endswith(ending)]
        if len(found) != 1:
            raise LookupError(f"{len(found)} manifests {kind} *{ending}, not one")
        return found[0]

    def images(self) -> set[str]:
        return {container["image"] for pod in self.pods() for container in containers(pod)}

    def pods(self) -> list[Manifest]:
        return [one for one in self.manifests if one["kind"] in ("DaemonSet", "Deployment", "Pod", "Job")]

    def move_port(self, port: int, to: int) -> None:
        """Where the machine uses a port already."""
        for pod in self.pods():
            for container in containers(pod):
                for entry in container.get("ports") or []:
                    if entry["containerPort"] == port:
                        entry["containerPort"] = to
        self.edit_config(lambda text: text.replace(f":{port}", f":{to}"))

    def edit_config(self, edit: Any) -> None:
        data = self.one("ConfigMap")["data"]
        data["domaind.toml"] = edit(data["domaind.toml"])

    def config(self) -> str:
        return str(self.one("ConfigMap")["data"]["domaind.toml"])


def containers(manifest: Manifest) -> list[Manifest]:
    spec = pod_spec(manifest)
    return [*(spec.get("initContainers") or []), *spec["containers"]]


def pod_spec(manifest: Manifest) -> Manifest:
    spec = manifest["spec"]
    return spec if manifest["kind"] == "Pod" else spec["template"]["spec"]


def variant(
    manifest: Manifest,
    name: str,
    *,
    args: list[str] | None = None,
    command: list[str] | None = None,
    image: str | None = None,
    user: int | None = None,
    memory: str | None = None,
    once: bool = False,
) -> Manifest:
    """A pod like that of the manifest, but for what is said here. `once`: it is not
    started again when it ends."""
    source = copy.deepcopy(manifest)
    meta = source["metadata"] if source["kind"] == "Pod" else source["spec"]["template"]["metadata"]
    spec = pod_spec(source)
    container = spec["containers"][0]
    if args is not None:
        container["args"] = args
    if command is not None:
        container["command"] = command
    if image is not None:
        container["image"] = image
        container.pop("command", None)
    if user is not None:
        spec["securityContext"] |= {"runAsUser": user, "runAsGroup": user}
    if memory is not None:
        container["resources"].setdefault("requests", {})["memory"] = memory
        container["resources"].setdefault("limits", {})["memory"] = memory
    if once:
        spec["restartPolicy"] = "Never"
    namespace = source["metadata"].get("namespace", "default")
    labels = dict(meta.get("labels") or {})
    return {"kind": "Pod", "metadata": {"name": name, "namespace": namespace, "labels": labels}, "spec": spec}


def only_init(manifest: Manifest, name: str) -> Manifest:
    """The first init container alone, as a pod of its own."""
    pod = variant(manifest, name, once=True)
    spec = pod["spec"]
    spec["containers"] = [spec.pop("initContainers")[0]]
    used = {mount["name"] for mount in spec["containers"][0]["volumeMounts"]}
    spec["volumes"] = [volume for volume in spec["volumes"] if volume["name"] in used]
    return pod
