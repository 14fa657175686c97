"""The mini-kubelet itself: what it does not know it refuses."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from chart import Chart, pod_spec
from minikubelet import convert
from minikubelet.spec import Pod
from minikubelet.strict import NotUnderstood

from stage import Failed, expect

#: Where pods run is decided already: a kubelet does not look at it, and neither does this one.
NOT_FOR_KUBELETS = {"nodeSelector", "tolerations", "affinity", "imagePullSecrets"}


def is_strict(charts: list[Chart]) -> str:
    """One unknown field, in any object of any pod of the chart, and the pod is refused; so are a
    pod on the host's network, a privileged container, and root where root is excluded."""
    tried = 0
    for manifest in (pod for chart in charts for pod in chart.pods()):
        Pod.read(manifest)
        for path in objects(pod_spec(manifest)):
            changed = copy.deepcopy(manifest)
            at(pod_spec(changed), path)["surprise"] = "1"
            refuse(changed, f"an unknown field in {path}")
            tried += 1
        for path, field, value in (
            ((), "hostNetwork", True),
            (("containers", 0, "securityContext"), "privileged", True),
            (("containers", 0, "securityContext"), "runAsUser", 0),
            (("securityContext", "seccompProfile"), "type", "Localhost"),
        ):
            changed = copy.deepcopy(manifest)
            at(pod_spec(changed), path)[field] = value
            refuse(changed, f"{field}: {value}")
            tried += 1
    expect(tried > 100, f"only {tried} changes were tried")
    return f"{tried} pods with one thing that it does not know or must not do were refused"


def refuse(manifest: dict[str, Any], why: str) -> None:
    try:
        pod = Pod.read(manifest)
        for one in pod.every_container():
            convert.security(pod, one)
    except NotUnderstood:
        return
    raise Failed(f"{manifest['kind']} {manifest['metadata']['name']} was taken in spite of {why}")


def objects(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all objects at and below a value."""
    if isinstance(value, dict):
        yield path
        for key, below in value.items():
            if key not in NOT_FOR_KUBELETS:
                yield from objects(below, (*path, key))
    elif isinstance(value, list):
        for number, below in enumerate(value):
            yield from objects(below, (*path, number))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value
