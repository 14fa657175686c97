"""Pods as a kubelet needs them, read from manifests. Every field is understood or
refused; nothing here talks to a runtime."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from . import quantity
from .strict import Fields, NotUnderstood, reading


@dataclass(frozen=True)
class Resources:
    """Requests and limits; a limit without a request is the request, too."""

    cpu_request: Decimal | None = None
    cpu_limit: Decimal | None = None
    memory_request: int | None = None
    memory_limit: int | None = None

    @staticmethod
    def read(fields: Fields) -> Resources:
        limits, requests = fields.sub("limits"), fields.sub("requests")
        fields.done()
        cpu_limit, memory_limit = limits.take("cpu"), limits.take("memory")
        cpu, memory = requests.take("cpu", cpu_limit), requests.take("memory", memory_limit)
        for side in limits, requests:
            # Nodes count it; containers here write next to nothing to disk.
            side.ignore("ephemeral-storage")
            side.done()
        return Resources(
            cpu_request=None if cpu is None else quantity.parse(cpu),
            cpu_limit=None if cpu_limit is None else quantity.parse(cpu_limit),
            memory_request=None if memory is None else quantity.whole(memory),
            memory_limit=None if memory_limit is None else quantity.whole(memory_limit),
        )


@dataclass(frozen=True)
class Security:
    """What pods and containers may say; a container's word wins."""

    run_as_user: int | None = None
    run_as_group: int | None = None
    run_as_non_root: bool | None = None
    seccomp: str | None = None

    @staticmethod
    def take(fields: Fields) -> Security:
        return Security(
            run_as_user=fields.take("runAsUser"),
            run_as_group=fields.take("runAsGroup"),
            run_as_non_root=fields.take("runAsNonRoot"),
            seccomp=seccomp(fields.sub("seccompProfile")),
        )

    def or_else(self, pod: Security) -> Security:
        def pick(own: Any, other: Any) -> Any:
            return other if own is None else own

        return Security(
            pick(self.run_as_user, pod.run_as_user),
            pick(self.run_as_group, pod.run_as_group),
            pick(self.run_as_non_root, pod.run_as_non_root),
            pick(self.seccomp, pod.seccomp),
        )


def seccomp(fields: Fields) -> str | None:
    kind = fields.take("type")
    fields.done()
    if kind not in (None, "RuntimeDefault", "Unconfined"):
        raise NotUnderstood(f"{fields.path}.type: {kind!r}")
    return kind


@dataclass(frozen=True)
class Probe:
    """How to ask, and how often."""

    http_path: str | None
    http_port: int | str | None
    command: tuple[str, ...]
    initial_delay_s: float
    period_s: float
    timeout_s: float
    success_threshold: int
    failure_threshold: int

    @staticmethod
    def read(fields: Fields, name: str) -> Probe | None:
        value = fields.take(name)
        if value is None:
            return None
        with reading(f"{fields.path}.{name}", value) as probe:
            get, run = probe.take("httpGet"), probe.take("exec")
            if (get is None) == (run is None):
                raise NotUnderstood(f"{probe.path}: either httpGet or exec")
            path = port = None
            command: tuple[str, ...] = ()
            if get is not None:
                with reading(f"{probe.path}.httpGet", get) as http:
                    http.must_be("scheme", "HTTP")
                    path, port = http.take("path", "/"), http.need("port")
            if run is not None:
                with reading(f"{probe.path}.exec", run) as execute:
                    command = tuple(execute.need("command"))
            return Probe(
                http_path=path,
                http_port=port,
                command=command,
                initial_delay_s=probe.take("initialDelaySeconds", 0),
                period_s=probe.take("periodSeconds", 10),
                timeout_s=probe.take("timeoutSeconds", 1),
                success_threshold=probe.take("successThreshold", 1),
                failure_threshold=probe.take("failureThreshold", 3),
            )


@dataclass(frozen=True)
class EnvVar:
    """A variable, or where its value comes from."""

    name: str
    value: str | None
    field_path: str | None
    resource: str | None

    @staticmethod
    def read(fields: Fields) -> EnvVar:
        name, value = fields.need("name"), fields.take("value")
        source = fields.sub("valueFrom")
        fields.done()
        path = resource = None
        ref = source.take("fieldRef")
        if ref is not None:
            with reading(f"{source.path}.fieldRef", ref) as by_field:
                by_field.must_be("apiVersion", "v1")
                path = by_field.need("fieldPath")
        ref = source.take("resourceFieldRef")
        if ref is not None:
            with reading(f"{source.path}.resourceFieldRef", ref) as by_resource:
                by_resource.must_be("divisor", "0", "1", 0, 1)
                resource = by_resource.need("resource")
        source.done()
        return EnvVar(name, value, path, resource)


@dataclass(frozen=True)
class VolumeMount:
    """Where in the container a volume is."""

    name: str
    mount_path: str
    read_only: bool
    propagation: str
    sub_path: str

    @staticmethod
    def read(fields: Fields) -> VolumeMount:
        mount = VolumeMount(
            name=fields.need("name"),
            mount_path=fields.need("mountPath"),
            read_only=fields.take("readOnly", False),
            propagation=fields.take("mountPropagation", "None"),
            sub_path=fields.take("subPath", ""),
        )
        fields.done()
        if mount.propagation not in ("None", "HostToContainer"):
            raise NotUnderstood(f"{fields.path}.mountPropagation: {mount.propagation!r}")
        if mount.sub_path.startswith("/") or ".." in mount.sub_path.split("/"):
            raise NotUnderstood(f"{fields.path}.subPath: {mount.sub_path!r}")
        return mount


@dataclass(frozen=True)
class Container:
    """One container, with what its pod says for it."""

    name: str
    image: str
    command: tuple[str, ...]
    args: tuple[str, ...]
    working_dir: str
    env: tuple[EnvVar, ...]
    mounts: tuple[VolumeMount, ...]
    resources: Resources
    security: Security
    read_only_root: bool
    no_new_privileges: bool
    add_capabilities: tuple[str, ...]
    drop_capabilities: tuple[str, ...]
    ports: dict[str, int]
    startup: Probe | None
    liveness: Probe | None
    readiness: Probe | None
    is_sidecar: bool

    @staticmethod
    def read(fields: Fields, pod: Security, *, init: bool) -> Container:
        fields.must_be("imagePullPolicy", "IfNotPresent", "Never", "Always")
        # Only who describes the pod afterwards uses them.
        fields.must_be("terminationMessagePolicy", "FallbackToLogsOnError", "File")
        fields.must_be("terminationMessagePath", "/dev/termination-log")
        fields.must_be("tty", False)
        fields.must_be("stdin", False)
        restart = fields.take("restartPolicy")
        if restart is not None and not (init and restart == "Always"):
            raise NotUnderstood(f"{fields.path}.restartPolicy: {restart!r}")
        with reading(f"{fields.path}.securityContext", fields.take("securityContext")) as context:
            security = Security.take(context).or_else(pod)
            context.must_be("privileged", False)
            context.must_be("procMount", "Default")
            read_only_root = context.take("readOnlyRootFilesystem", False)
            may_escalate = context.take("allowPrivilegeEscalation", True)
            capabilities = context.sub("capabilities")
            add, drop = capabilities.take("add", []), capabilities.take("drop", [])
            capabilities.done()
        ports: dict[str, int] = {}
        for port in fields.items("ports"):
            port.must_be("protocol", "TCP")
            number = port.need("containerPort")
            ports[port.take("name", str(number))] = number
            port.done()
        container = Container(
            name=fields.need("name"),
            image=fields.need("image"),
            command=tuple(fields.take("command", [])),
            args=tuple(str(arg) for arg in fields.take("args", [])),
            working_dir=fields.take("workingDir", ""),
            env=tuple(EnvVar.read(variable) for variable in fields.items("env")),
            mounts=tuple(VolumeMount.read(mount) for mount in fields.items("volumeMounts")),
            resources=Resources.read(fields.sub("resources")),
            security=security,
            read_only_root=read_only_root,
            no_new_privileges=not may_escalate,
            add_capabilities=tuple(add),
            drop_capabilities=tuple(drop),
            ports=ports,
            startup=Probe.read(fields, "startupProbe"),
            liveness=Probe.read(fields, "livenessProbe"),
            readiness=Probe.read(fields, "readinessProbe"),
            is_sidecar=restart == "Always",
        )
        fields.done()
        return container


@dataclass(frozen=True)
class Volume:
    """What is to be mounted, not yet made."""

    name: str
    kind: str
    config_map: str = ""
    optional: bool = False
    mode: int = 0o644
    item_paths: dict[str, str] | None = None
    host_path: str = ""
    host_type: str = ""
    in_memory: bool = False
    size_limit: int | None = None

    @staticmethod
    def read(fields: Fields) -> Volume:
        name = fields.need("name")
        kinds = [kind for kind in ("configMap", "hostPath", "emptyDir") if fields.has(kind)]
        if len(kinds) != 1:
            raise NotUnderstood(f"{fields.path}: a volume that is none of configMap, hostPath, emptyDir")
        kind = kinds[0]
        source = fields.sub(kind)
        fields.done()
        volume = Volume(name, kind)
        if kind == "configMap":
            items = source.items("items")
            paths = {item.need("key"): item.need("path") for item in items}
            for item in items:
                item.done()
            volume = replace(
                volume,
                config_map=source.need("name"),
                optional=source.take("optional", False),
                mode=source.take("defaultMode", 0o644),
                item_paths=paths or None,
            )
        elif kind == "hostPath":
            volume = replace(volume, host_path=source.need("path"), host_type=source.take("type", ""))
        else:
            medium, size = source.take("medium", ""), source.take("sizeLimit")
            if medium not in ("", "Memory"):
                raise NotUnderstood(f"{source.path}.medium: {medium!r}")
            volume = replace(
                volume, in_memory=medium == "Memory", size_limit=None if size is None else quantity.whole(size)
            )
        source.done()
        return volume


@dataclass(frozen=True)
class Pod:
    """One pod, before it has an identity."""

    name: str
    namespace: str
    labels: dict[str, str]
    annotations: dict[str, str]
    host_pid: bool
    shares_processes: bool
    fs_group: int | None
    supplemental_groups: tuple[int, ...]
    containers: tuple[Container, ...]
    init_containers: tuple[Container, ...]
    volumes: tuple[Volume, ...]
    grace_s: int
    restart_policy: str
    priority_class: str
    service_account: str

    @staticmethod
    def read(manifest: dict[str, Any]) -> Pod:
        """From a Pod, or from what makes pods by a template."""
        kind, meta = manifest["kind"], manifest["metadata"]
        if kind == "Pod":
            return Pod._of(f"Pod {meta['name']}", meta, manifest["spec"])
        if kind in ("DaemonSet", "Deployment", "StatefulSet", "Job"):
            template = manifest["spec"]["template"]
            named = {"name": meta["name"], "namespace": meta.get("namespace", "default")} | template["metadata"]
            return Pod._of(f"{kind} {meta['name']}", named, template["spec"])
        raise NotUnderstood(f"a {kind} makes no pods")

    @staticmethod
    def _of(path: str, meta: dict[str, Any], spec: dict[str, Any]) -> Pod:
        with reading(path, spec) as fields:
            # Where it runs is decided already, and there is no API server to talk to.
            fields.ignore("nodeSelector", "tolerations", "affinity", "imagePullSecrets", "topologySpreadConstraints")
            fields.must_be("automountServiceAccountToken", False)
            fields.must_be("enableServiceLinks", False, True)
            fields.must_be("hostNetwork", False)
            fields.must_be("hostIPC", False)
            fields.must_be("hostUsers", True)
            fields.must_be("dnsPolicy", "ClusterFirst", "Default")
            fields.must_be("os", {"name": "linux"})
            with reading(f"{path}.securityContext", fields.take("securityContext")) as context:
                security = Security.take(context)
                context.must_be("fsGroupChangePolicy", "OnRootMismatch", "Always")
                context.must_be("supplementalGroupsPolicy", "Merge")
                fs_group = context.take("fsGroup")
                groups = tuple(context.take("supplementalGroups", []))
            return Pod(
                name=meta["name"],
                namespace=meta.get("namespace", "default"),
                labels=dict(meta.get("labels") or {}),
                annotations={key: str(value) for key, value in (meta.get("annotations") or {}).items()},
                host_pid=fields.take("hostPID", False),
                shares_processes=fields.take("shareProcessNamespace", False),
                fs_group=fs_group,
                supplemental_groups=groups,
                containers=tuple(Container.read(one, security, init=False) for one in fields.items("containers")),
                init_containers=tuple(
                    Container.read(one, security, init=True) for one in fields.items("initContainers")
                ),
                volumes=tuple(Volume.read(one) for one in fields.items("volumes")),
                grace_s=fields.take("terminationGracePeriodSeconds", 30),
                restart_policy=fields.take("restartPolicy", "Always"),
                priority_class=fields.take("priorityClassName", ""),
                service_account=fields.take("serviceAccountName", "default"),
            )

    def every_container(self) -> tuple[Container, ...]:
        return self.init_containers + self.containers

    def qos(self) -> str:
        """As Kubernetes classes pods."""
        every = [one.resources for one in self.every_container()]
        asked = [(r.cpu_request, r.memory_request, r.cpu_limit, r.memory_limit) for r in every]
        if all(value is None for values in asked for value in values):
            return "besteffort"
        if all(
            None not in (r.cpu_limit, r.memory_limit)
            and r.cpu_request == r.cpu_limit
            and r.memory_request == r.memory_limit
            for r in every
        ):
            return "guaranteed"
        return "burstable"

    def cgroup(self, uid: str) -> str:
        """Where a node with the cgroupfs driver puts it."""
        between = "" if self.qos() == "guaranteed" else f"/{self.qos()}"
        return f"/kubepods{between}/pod{uid}"

    def memory_limit(self) -> int | None:
        """Of the pod as a whole; `None` when some container has no limit."""
        limits = [one.resources.memory_limit for one in self.every_container()]
        if None in limits:
            return None
        sidecars = apart = 0
        for one in self.init_containers:
            limit = one.resources.memory_limit or 0
            if one.is_sidecar:
                sidecars += limit
            apart = max(apart, sidecars + (0 if one.is_sidecar else limit))
        return max(apart, sidecars + sum(one.resources.memory_limit or 0 for one in self.containers))


@dataclass
class Identity:
    """What an API server would have given a pod."""

    uid: str
    node_name: str
    host_ip: str = "127.0.0.1"


def expand(text: str, env: dict[str, str]) -> str:
    """`$(NAME)` as Kubernetes does it: unknown names stay, `$$` is one `$`."""

    def one(match: re.Match[str]) -> str:
        if match.group(0) == "$$":
            return "$"
        return env.get(match.group(1), match.group(0))

    return re.sub(r"\$\$|\$\(([A-Za-z_.-][A-Za-z0-9_.-]*)\)", one, text)


def environment(pod: Pod, container: Container, identity: Identity) -> dict[str, str]:
    """The variables of a container."""
    env: dict[str, str] = {}
    for variable in container.env:
        if variable.field_path is not None:
            env[variable.name] = downward(pod, identity, variable.field_path)
        elif variable.resource is not None:
            env[variable.name] = resource(container, variable.resource)
        else:
            env[variable.name] = expand(variable.value or "", env)
    return env


def downward(pod: Pod, identity: Identity, path: str) -> str:
    known = {
        "metadata.name": pod.name,
        "metadata.namespace": pod.namespace,
        "metadata.uid": identity.uid,
        "spec.nodeName": identity.node_name,
        "spec.serviceAccountName": pod.service_account,
        "status.hostIP": identity.host_ip,
        "status.podIP": identity.host_ip,
    }
    if path not in known:
        raise NotUnderstood(f"fieldPath {path!r}")
    return known[path]


def resource(container: Container, name: str) -> str:
    limits = container.resources
    known = {"limits.memory": limits.memory_limit, "requests.memory": limits.memory_request}
    value = known.get(name)
    if value is None:
        raise NotUnderstood(f"resourceFieldRef {name!r}")
    return str(value)
