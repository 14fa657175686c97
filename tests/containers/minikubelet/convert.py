"""From pods to the messages of the CRI, as a kubelet makes them."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

from .cri import api
from .spec import Container, Identity, Pod, Security, environment, expand
from .strict import NotUnderstood

CPU_PERIOD_US = 100_000
# What a kubelet hides and protects of /proc and /sys unless told otherwise.
MASKED = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
]
READ_ONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
OOM_SCORE_OF_CRITICAL = -997
OOM_SCORE = {"guaranteed": -997, "besteffort": 1000, "burstable": 500}


def sandbox(pod: Pod, identity: Identity, log_dir: Path) -> api.PodSandboxConfig:
    return api.PodSandboxConfig(
        metadata=api.PodSandboxMetadata(name=pod.name, uid=identity.uid, namespace=pod.namespace),
        # No hostname: on the host's network a pod has the host's.
        log_directory=str(log_dir),
        labels=pod.labels
        | {
            "io.kubernetes.pod.name": pod.name,
            "io.kubernetes.pod.namespace": pod.namespace,
            "io.kubernetes.pod.uid": identity.uid,
        },
        annotations=pod.annotations,
        linux=api.LinuxPodSandboxConfig(
            cgroup_parent=pod.cgroup(identity.uid),
            security_context=api.LinuxSandboxSecurityContext(
                namespace_options=namespaces(pod),
                readonly_rootfs=True,
                seccomp=api.SecurityProfile(profile_type=api.SecurityProfile.RuntimeDefault),
            ),
        ),
    )


def container(
    pod: Pod, one: Container, identity: Identity, image_id: str, attempt: int, mounts: list[api.Mount]
) -> api.ContainerConfig:
    env = environment(pod, one, identity)
    return api.ContainerConfig(
        metadata=api.ContainerMetadata(name=one.name, attempt=attempt),
        image=api.ImageSpec(image=image_id),
        command=[expand(word, env) for word in one.command],
        args=[expand(word, env) for word in one.args],
        working_dir=one.working_dir,
        envs=[api.KeyValue(key=key, value=value) for key, value in env.items()],
        mounts=mounts,
        labels={
            "io.kubernetes.container.name": one.name,
            "io.kubernetes.pod.name": pod.name,
            "io.kubernetes.pod.namespace": pod.namespace,
            "io.kubernetes.pod.uid": identity.uid,
        },
        annotations={"io.kubernetes.container.restartCount": str(attempt)},
        log_path=f"{one.name}/{attempt}.log",
        linux=api.LinuxContainerConfig(resources=resources(pod, one), security_context=security(pod, one)),
    )


def namespaces(pod: Pod) -> api.NamespaceOption:
    """The network is always the host's: there is no CNI plugin."""
    shared = api.POD if pod.shares_processes else api.CONTAINER
    pid = api.NODE if pod.host_pid else shared
    return api.NamespaceOption(network=api.NODE, pid=pid, ipc=api.POD)


def security(pod: Pod, one: Container) -> api.LinuxContainerSecurityContext:
    refuse_root(one, one.security)
    context = api.LinuxContainerSecurityContext(
        capabilities=api.Capability(add_capabilities=one.add_capabilities, drop_capabilities=one.drop_capabilities),
        namespace_options=namespaces(pod),
        readonly_rootfs=one.read_only_root,
        supplemental_groups=[*pod.supplemental_groups, *([] if pod.fs_group is None else [pod.fs_group])],
        no_new_privs=one.no_new_privileges,
        masked_paths=MASKED,
        readonly_paths=READ_ONLY,
        seccomp=profile(one.security),
    )
    if one.security.run_as_user is not None:
        context.run_as_user.value = one.security.run_as_user
    if one.security.run_as_group is not None:
        context.run_as_group.value = one.security.run_as_group
    return context


def refuse_root(one: Container, said: Security) -> None:
    """A kubelet does not start what would be root in spite of its manifest."""
    if said.run_as_non_root and said.run_as_user in (None, 0):
        raise NotUnderstood(f"{one.name}: runAsNonRoot, and the user is {said.run_as_user}")


def profile(said: Security) -> api.SecurityProfile:
    """A node confines nobody who did not ask for it."""
    kinds = {"RuntimeDefault": api.SecurityProfile.RuntimeDefault}
    kind = kinds.get(said.seccomp or "", api.SecurityProfile.Unconfined)
    return api.SecurityProfile(profile_type=kind)


def resources(pod: Pod, one: Container) -> api.LinuxContainerResources:
    asked = one.resources
    quota = 0
    if asked.cpu_limit is not None:
        quota = int(asked.cpu_limit * CPU_PERIOD_US)
    return api.LinuxContainerResources(
        cpu_period=CPU_PERIOD_US if quota else 0,
        cpu_quota=quota,
        cpu_shares=max(2, int((asked.cpu_request or Decimal(0)) * 1024)),
        memory_limit_in_bytes=asked.memory_limit or 0,
        oom_score_adj=oom_score(pod),
    )


def oom_score(pod: Pod) -> int:
    if pod.priority_class.startswith("system-"):
        return OOM_SCORE_OF_CRITICAL
    return OOM_SCORE[pod.qos()]
