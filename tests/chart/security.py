"""What pods may do, against the pod security standard `restricted` and our own rules."""

# As the standard lists them.
RESTRICTED_VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret",
}
BASELINE_SELINUX = {"", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}


def containers(spec):
    return spec.get("initContainers", []) + spec["containers"] + spec.get("ephemeralContainers", [])


def deviations(spec):
    """In what a pod is not `restricted`, one word group each."""
    found = {flag for flag in ("hostPID", "hostIPC", "hostNetwork") if spec.get(flag)}
    for volume in spec.get("volumes", []):
        for kind in volume.keys() - {"name"} - RESTRICTED_VOLUMES:
            found.add(f"{kind} {volume[kind].get('path', '')}".strip())
    context = spec.get("securityContext", {})
    found |= context_deviations("pod", context, {})
    if context.get("sysctls"):
        found.add("sysctls")
    for container in containers(spec):
        own = container.get("securityContext", {})
        found |= context_deviations(container["name"], own, context)
        found |= container_deviations(container["name"], own)
        if any(port.get("hostPort") for port in container.get("ports", [])):
            found.add(f"{container['name']}: hostPort")
    return found


def context_deviations(who, own, inherited):
    """What may stand on a pod and on a container."""
    found = set()
    both = inherited | own
    if inherited or who == "pod":
        if both.get("runAsNonRoot") is not True:
            found.add(f"{who}: runAsNonRoot is not true")
        if both.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
            found.add(f"{who}: no seccomp profile")
    if own.get("runAsUser") == 0:
        found.add(f"{who}: runs as root")
    if own.get("seLinuxOptions", {}).get("type", "") not in BASELINE_SELINUX:
        found.add(f"{who}: seLinux type {own['seLinuxOptions']['type']}")
    return found


def container_deviations(who, own):
    found = set()
    if own.get("privileged"):
        found.add(f"{who}: privileged")
    if own.get("allowPrivilegeEscalation") is not False:
        found.add(f"{who}: allowPrivilegeEscalation is not false")
    if own.get("procMount", "Default") != "Default":
        found.add(f"{who}: procMount")
    capabilities = own.get("capabilities", {})
    if capabilities.get("drop") != ["ALL"]:
        found.add(f"{who}: does not drop ALL")
    added = set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}
    if added:
        found.add(f"{who}: adds {' '.join(sorted(added))}")
    return found


def daemon_deviations(host_path, host_pid=True):
    """What the DaemonSet's pods need, and no more."""
    return {f"hostPath {host_path}", "prepare-dir: runAsNonRoot is not true", "prepare-dir: runs as root",
            "prepare-dir: adds CHOWN DAC_OVERRIDE FOWNER"} | ({"hostPID"} if host_pid else set())  # fmt: skip


def client_deviations(host_path):
    return {f"hostPath {host_path}/public"}


def careless(name, meta, spec):
    """Our own rules, beyond the standard: for every pod of ours."""
    if spec.get("automountServiceAccountToken") is not False:
        yield f"{name} mounts a token"
    if spec.get("enableServiceLinks") is not False:
        yield f"{name} has variables of services, which may be named DOMAIND_*"
    for flag in ("hostNetwork", "hostIPC"):
        if spec.get(flag, False) is not False:
            yield f"{name}: {flag}"
    uid = spec["securityContext"].get("runAsUser")
    if not uid or uid == 65534:
        yield f"{name}: user {uid}"
    for container in containers(spec):
        yield from careless_container(f"{name}, {container['name']}", container)


def careless_container(name, container):
    context = container.get("securityContext", {})
    if context.get("readOnlyRootFilesystem") is not True:
        yield f"{name}: the root file system is writable"
    if context.get("privileged") is not False:
        yield f"{name}: privileged is not false"
    resources = container.get("resources", {})
    limit = resources.get("limits", {}).get("memory")
    if not limit:
        yield f"{name}: no limit of memory"
    if resources.get("requests", {}).get("memory") != limit:
        yield f"{name}: requests {resources.get('requests', {}).get('memory')} of memory, limit {limit}"
    for mount in container.get("volumeMounts", []):
        if mount.get("mountPropagation"):
            yield f"{name}: propagates mounts"


def careless_client(name, spec):
    """A client mounts the directory read-only, and does not make it where no daemon has."""
    for volume in spec["volumes"]:
        if "hostPath" in volume and volume["hostPath"].get("type") != "Directory":
            yield f"{name}: volume {volume['name']} has type {volume['hostPath'].get('type')}"
    host = {volume["name"] for volume in spec["volumes"] if "hostPath" in volume}
    for container in containers(spec):
        for mount in container["volumeMounts"]:
            if mount["name"] in host and mount.get("readOnly") is not True:
                yield f"{name}, {container['name']}: {mount['mountPath']} is not read-only"
