"""What the chart promises of its resources, beyond their shape."""

import config
import security
from chart import get, merged, of_kind, pods, put


def one(docs, kind):
    (doc,) = of_kind(docs, kind)
    return doc


def daemon_pod(docs):
    return one(docs, "DaemonSet")["spec"]["template"]


def what_pods_may(docs, values):
    """Each pod deviates from the standard in what it needs, and in nothing else."""
    path = values["sockets"]["hostPath"].replace("/var/run/", "/run/")
    for name, meta, spec in pods(docs):
        if name.startswith("DaemonSet"):
            wanted = security.daemon_deviations(path, values["hostPID"])
            selinux = values["podSecurityContext"]["seLinuxOptions"].get("type")
            wanted |= {f"pod: seLinux type {selinux}"} if selinux else set()
            if spec["securityContext"]["supplementalGroups"] != [values["sockets"]["gid"]]:
                yield f"{name}: groups {spec['securityContext']['supplementalGroups']}"
        else:
            wanted = security.client_deviations(path)
            yield from security.careless_client(name, spec)
        found = security.deviations(spec)
        yield from (f"{name} is less than restricted: {each}" for each in sorted(found - wanted))
        yield from (f"{name} should need: {each}" for each in sorted(wanted - found))
        yield from security.careless(name, meta, spec)


def daemon_set(docs, values):
    doc, template = one(docs, "DaemonSet"), daemon_pod(docs)
    spec, meta = template["spec"], template["metadata"]
    main = spec["containers"][0]
    if main["name"] != "domaind" or meta["annotations"]["kubectl.kubernetes.io/default-container"] != "domaind":
        yield f"the first container is {main['name']}, the default one {meta['annotations']}"
    if main["args"][:3] != ["serve", "--config", "/etc/domaind/domaind.toml"]:
        yield f"the daemon is started with {main['args']}"
    if [each["name"] for each in main["env"]][:3] != ["NODE_NAME", "POD_NAMESPACE", "POD_UID"]:
        yield f"variables {main['env']}"
    ours = [main, spec["initContainers"][0]]
    yield from (
        f"{each['name']}: {each.get('terminationMessagePolicy')}"
        for each in ours
        if each.get("terminationMessagePolicy") != "FallbackToLogsOnError"
    )
    user = values["podSecurityContext"]
    prepared = ["prepare-dir", "--runtime-dir", "/run/domaind", "--uid", str(user["runAsUser"]), "--gid",
                str(user["runAsGroup"]), "--client-gid", str(values["sockets"]["gid"])]  # fmt: skip
    if spec["initContainers"][0]["args"] != prepared:
        yield f"prepare-dir is started with {spec['initContainers'][0]['args']}"
    if spec["priorityClassName"] != values["priorityClassName"]:
        yield f"priority {spec['priorityClassName']}"
    if "maxSurge" in doc["spec"]["updateStrategy"].get("rollingUpdate", {}):
        yield "it surges"
    if spec["terminationGracePeriodSeconds"] <= 10:
        yield "it is killed while it stops"
    config_mount = {"name": "config", "mountPath": "/etc/domaind", "readOnly": True}
    if config_mount not in main["volumeMounts"]:
        yield f"the configuration is not mounted read-only: {main['volumeMounts']}"


def probes(docs, values):
    main = daemon_pod(docs)["spec"]["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in main.get("ports", [])}
    http = {"livenessProbe": "/livez", "readinessProbe": "/readyz"}
    for name in ("startupProbe", *http):
        probe = main[name]
        if values["metrics"]["enabled"] and name in http:
            if probe.get("httpGet") != {"path": http[name], "port": "metrics"} or "exec" in probe:
                yield f"{name} asks {probe}"
        elif probe.get("exec", {}).get("command", [])[:2] != ["/usr/bin/domainctl", "health"] or "httpGet" in probe:
            yield f"{name} asks {probe}"
    wanted = {"metrics": values["metrics"]["port"]} if values["metrics"]["enabled"] else {}
    if ports != wanted:
        yield f"ports {ports}, not {wanted}"


def network(docs, values):
    """Ingress to the metrics port, egress nowhere, for the daemon's pods and no others."""
    policies = of_kind(docs, "NetworkPolicy")
    if not values["networkPolicy"]["enabled"]:
        yield from (f"there is {policy['metadata']['name']}" for policy in policies)
        return
    (policy,) = policies
    spec = policy["spec"]
    if spec["policyTypes"] != ["Ingress", "Egress"] or spec.get("egress"):
        yield f"egress: {spec.get('egress')}, types {spec['policyTypes']}"
    rule = {"ports": [{"port": "metrics", "protocol": "TCP"}]}
    if values["networkPolicy"]["metricsFrom"]:
        rule["from"] = values["networkPolicy"]["metricsFrom"]
    wanted = [rule] if values["metrics"]["enabled"] else None
    if spec.get("ingress") != wanted:
        yield f"ingress {spec.get('ingress')}, not {wanted}"
    yield from selects_the_daemon_only(policy["metadata"]["name"], spec["podSelector"]["matchLabels"], docs)


def monitor(docs, values):
    """Where the operator looks, with the labels by which it finds it, and looking where the pods are."""
    given = values["metrics"]["podMonitor"]
    for doc in of_kind(docs, "PodMonitor"):
        here = one(docs, "DaemonSet")["metadata"]["namespace"]
        meta, spec = doc["metadata"], doc["spec"]
        if meta["namespace"] != (given["namespace"] or here):
            yield f"it is in namespace {meta['namespace']}"
        if not given["labels"].items() <= meta["labels"].items():
            yield f"labels {meta['labels']}"
        if spec["namespaceSelector"] != {"matchNames": [here]}:
            yield f"it looks in {spec['namespaceSelector']}"
        yield from selects_the_daemon_only("it", spec["selector"]["matchLabels"], docs)
    if len(of_kind(docs, "PodMonitor")) != int(given["enabled"]):
        yield f"there are {len(of_kind(docs, 'PodMonitor'))}"


def selects_the_daemon_only(name, wanted, docs):
    for pod, meta, _ in pods(docs):
        is_selected = wanted.items() <= meta["labels"].items()
        if is_selected != pod.startswith("DaemonSet"):
            yield f"{name} selects {pod}: {is_selected}"


def selectors(docs):
    doc = one(docs, "DaemonSet")
    labels = doc["spec"]["selector"]["matchLabels"]
    wanted = {"app.kubernetes.io/" + key for key in ("name", "instance", "component")}
    if labels.keys() != wanted:
        yield f"the selector is {labels}"
    yield from selects_the_daemon_only("the DaemonSet", labels, docs)
    for deployment in of_kind(docs, "Deployment"):
        if not deployment["spec"]["selector"]["matchLabels"].items() <= deployment["spec"]["template"]["metadata"]["labels"].items():
            yield f"{deployment['metadata']['name']} does not select its own pods"


def accounts(docs, values):
    made = {doc["metadata"]["name"] for doc in of_kind(docs, "ServiceAccount")}
    used = {spec["serviceAccountName"] for _, _, spec in pods(docs)}
    if not values["serviceAccount"]["create"]:
        used.discard(values["serviceAccount"]["name"])
    if made != used:
        yield f"made are {sorted(made)}, used {sorted(used)}"
    for doc in of_kind(docs, "ServiceAccount"):
        if doc.get("automountServiceAccountToken") is not False:
            yield f"{doc['metadata']['name']} mounts a token"
    for doc in docs:
        if doc["kind"].endswith(("Role", "RoleBinding")):
            yield f"it has rights: {doc['kind']} {doc['metadata']['name']}"


def memory(docs, values):
    """The daemon pays for all regions, and has room for itself."""
    resources = daemon_pod(docs)["spec"]["containers"][0]["resources"]
    limit = resources["limits"]["memory"]
    needed = config.memory_needed(values["regions"]["maxBytes"])
    given = values["resources"]["limits"]["memory"]
    if limit != (given or f"{needed}Mi") or config.size(limit) < needed << 20:
        yield f"limit {limit}, needed are {needed}Mi"
    huge = values["regions"]["hugepages2Mi"]
    for part in ("requests", "limits"):
        if resources[part].get("hugepages-2Mi", "") != huge:
            yield f"{part} {resources[part].get('hugepages-2Mi')} of huge pages, not {huge}"


def arithmetic(chart):
    """Sizes of any unit, at and around borders."""
    for regions in ("1", "1Mi", "64Mi", "100Mi", "1000Mi", "1Gi", "3Gi", "1Ti", "1073741825", "17179869183"):
        needed = config.memory_needed(regions)
        docs = chart.documents({"regions": {"maxBytes": regions}})
        limit = daemon_pod(docs)["spec"]["containers"][0]["resources"]["limits"]["memory"]
        if limit != f"{needed}Mi":
            yield f"regions.maxBytes {regions}: limit {limit}, not {needed}Mi"
        if f"region_bytes = {config.size(regions)}\n" not in config.toml_of(docs):
            yield f"regions.maxBytes {regions} is not region_bytes {config.size(regions)}"
    exact = {"regions": {"maxBytes": "1Gi"}, "resources": {"limits": {"memory": "1227133514"}}}
    chart.render(exact)


def checksums(chart):
    """Which changes replace pods."""

    def checksum(values):
        template = daemon_pod(chart.documents(values))
        return template["metadata"]["annotations"]["checksum/config"]

    changes = {
        "policy.rules": ([{"name": "a", "uids": [1], "domains": ["*"]}], False),
        "declaredDomains": ([{"name": "a"}], False),
        "config.ackTimeoutMs": (100, False),
        "config.log.level": ("debug", False),
        "config.log.format": ("text", True),
        "config.workerThreads": (2, True),
        "sockets.gid": (77, True),
        "metrics.port": (9999, True),
    }
    for mode in ("any", "unreloadable"):
        base = put("config.restartFor", mode)
        before = checksum(base)
        if before != checksum(base):
            yield "the checksum of the same values differs"
        for path, (value, needs_restart) in changes.items():
            changes_it = checksum(merged(base, put(path, value))) != before
            if changes_it != (mode == "any" or needs_restart):
                yield f"restartFor {mode}: {path} replaces pods: {changes_it}"


def stable_selector(chart):
    """What a values file or a version changes is not in the selector of a DaemonSet, which can never change."""
    before = one(chart.documents({}), "DaemonSet")["spec"]["selector"]
    for path, value in (
        ("commonLabels", {"a": "b"}), ("podLabels", {"a": "b"}), ("image.tag", "2"), ("fullnameOverride", "x"),
        ("hostPID", True), ("metrics.enabled", False),
    ):  # fmt: skip
        after = one(chart.documents(put(path, value)), "DaemonSet")["spec"]["selector"]
        if after != before:
            yield f"{path} changes it to {after}"
    text = str(before)
    for version in (chart.handle.version, chart.handle.metadata["appVersion"]):
        if version in text:
            yield f"it has the version {version} in it"


def names(chart):
    """However long the names of a release are, resources have names that Kubernetes takes."""
    for release in ("a", "domaind", "r" * 53):
        docs = chart.documents({"clientExample": {"enabled": True}, "admissionPolicy": {"enabled": True}}, release)
        for doc in docs:
            limit = 253 if doc["kind"].startswith("ValidatingAdmissionPolicy") else 63
            if len(doc["metadata"]["name"]) > limit:
                yield f"release {release}: {doc['kind']} {doc['metadata']['name']}"
        for pod, meta, _ in pods(docs):
            yield from (f"{pod}: label {v}" for v in meta["labels"].values() if len(v) > 63)


def example(docs, values):
    """Two pods of two users, each with a rule of its own, on one node, in one declared domain."""
    pods_of = {doc["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"]: doc["spec"]["template"]["spec"]
               for doc in of_kind(docs, "Deployment")}  # fmt: skip
    if pods_of.keys() != {"driver", "device"}:
        yield f"there are {sorted(pods_of)}"
        return
    users = {role: spec["securityContext"]["runAsUser"] for role, spec in pods_of.items()}
    if len(set(users.values())) != 2 or get(values, "podSecurityContext.runAsUser") in users.values():
        yield f"users {users}"
    wanted = config.expected(values)
    rules = {(rule["uids"][0], tuple(rule["roles"]), tuple(rule["domains"])) for rule in wanted["policy"]["rules"]}
    domain = values["clientExample"]["domain"]
    if rules != {(users[role], (role,), (domain,)) for role in users} or domain not in str(wanted["domains"]):
        yield f"rules {rules}"
    for role, spec in pods_of.items():
        args = spec["containers"][0]["args"]
        moved = ["/usr/bin/domainctl"] if role == "driver" else []
        if args[: 5 + len(moved)] != ["demo", *moved, "--domain", domain, "--role", role] or "--repeat" not in args:
            yield f"{role} is started with {args}"
    affinity = pods_of["device"].get("affinity", {}).get("podAffinity", {})
    terms = affinity.get("requiredDuringSchedulingIgnoredDuringExecution", [])
    if [term["topologyKey"] for term in terms] != ["kubernetes.io/hostname"]:
        yield f"the device may be on another node than the driver: {affinity}"


# (values, words that the notes must have, words that they must not have)
NOTES = [
    ({}, ["pod-security.kubernetes.io/enforce=privileged", "import the archive that deploy/image", "nobody may do anything",
          "A restart of a daemon costs: all sessions", "helm test node -n domaind-system", "supplementalGroups: [4242]",
          "path: /run/domaind/public, type: Directory", "admissionPolicy.enabled", "maxUnavailable 1"],
     ["identity.mode is uid", "policy.default is owner", "domainctl reload"]),
    ({"policy": {"rules": [{"name": "a", "uids": [1], "domains": ["*"]}]}}, [], ["nobody may do anything"]),
    ({"clientExample": {"enabled": True}}, [], ["nobody may do anything"]),
    ({"policy": {"default": "owner"}}, ["every pod with that group may create domains"], ["nobody may do anything"]),
    ({"admissionPolicy": {"enabled": True}}, [], ["Whoever may create pods"]),
    ({"hostPID": False, "identity": {"mode": "uid"}}, ["identity.mode is uid"], ["hostPID and"]),
    ({"config": {"restartFor": "unreloadable"}}, ["domainctl reload"], ["Any change of the configuration"]),
    ({"image": {"registry": "r.example"}}, ["r.example/domaind:"], ["import the archive"]),
    ({"tests": {"enabled": False}}, [], ["helm test"]),
    ({"sockets": {"hostPath": "/run/x", "gid": 7}}, ["path: /run/x/public", "[7]"], ["/run/domaind/public, type"]),
]  # fmt: skip


def notes(chart):
    for values, wanted, unwanted in NOTES:
        text = chart.render(values)["NOTES.txt"]
        yield from (f"{values}: no {words!r}" for words in wanted if words not in text)
        yield from (f"{values}: {words!r}" for words in unwanted if words in text)
