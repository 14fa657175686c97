"""Values, schema and templates know the same names."""

import re

from chart import CHART, WHOLE, get, leaves, merged, put

# For charts that depend on this one; they stand in the schema only.
FOREIGN = {"global", "global.imageRegistry", "global.imagePullSecrets", "enabled"}
# They say something about a message or a refusal and render nothing by themselves.
REFUSED = {"updateStrategy.rollingUpdate.maxSurge"}

# Everything on that a value may need to matter. hostPID and identity.mode go together.
EVERYTHING = {
    "metrics": {"podMonitor": {"enabled": True}},
    "admissionPolicy": {"enabled": True, "denyParents": True},
    "resourceQuota": {"enabled": True},
    "clientExample": {"enabled": True},
    "identity": {"mode": "uid"},
    # Made by nobody, it has to have a name.
    "serviceAccount": {"name": "given"},
}

# What else has to be so for the other value to be allowed.
ALONG = {"metrics.enabled": {"metrics": {"podMonitor": {"enabled": False}}}}

_CONTAINER = {"name": "x", "image": "x", "resources": {"limits": {"memory": "1Mi"}}}

# Another value for each, where "another of its type" would not do.
OTHER = {
    "nameOverride": "other",
    "fullnameOverride": "other",
    "namespaceOverride": "other",
    "commonLabels": {"other": "x"},
    "commonAnnotations": {"other": "x"},
    "image.digest": "sha256:" + "a" * 64,
    "image.pullPolicy": "Never",
    "imagePullSecrets": [{"name": "other"}],
    "regions.maxBytes": "2Gi",
    "regions.hugepages2Mi": "64Mi",
    "resources.requests.cpu": "123m",
    "resources.limits.memory": "64Gi",
    "resources.limits.cpu": "3",
    "config.workerThreads": 3,
    "config.restartFor": "unreloadable",
    "config.log.format": "text",
    "config.log.level": "debug",
    "sockets.hostPath": "/run/other",
    "identity.mode": "cgroup",
    "policy.default": "owner",
    "policy.rules": [{"name": "other", "uids": [1], "domains": ["*"]}],
    "declaredDomains": [{"name": "other"}],
    "updateStrategy.type": "OnDelete",
    "nodeSelector": {"other": "x"},
    "tolerations": [],
    "affinity": {"nodeAffinity": {}},
    "podLabels": {"other": "x"},
    "podAnnotations": {"other": "x"},
    "podSecurityContext.seLinuxOptions": {"type": "other"},
    "prepareDir.resources.requests.cpu": "123m",
    "prepareDir.resources.limits.memory": "33Mi",
    "serviceAccount.annotations": {"other": "x"},
    "metrics.address": "[::]",
    "metrics.podMonitor.labels": {"other": "x"},
    "metrics.podMonitor.interval": "33s",
    "metrics.podMonitor.scrapeTimeout": "3s",
    "networkPolicy.metricsFrom": [{"podSelector": {}}],
    "admissionPolicy.allowedNamespaces": ["other"],
    "admissionPolicy.allowedServiceAccounts": ["other/x"],
    "admissionPolicy.parentNamespaces": ["other"],
    "admissionPolicy.validationActions": ["Audit"],
    "resourceQuota.pods": "33",
    "extraArgs": ["--other"],
    "extraEnv": [{"name": "OTHER", "value": "x"}],
    "extraVolumes": [{"name": "other", "emptyDir": {}}],
    "extraVolumeMounts": [{"name": "other", "mountPath": "/x"}],
    "extraInitContainers": [_CONTAINER],
    "extraContainers": [_CONTAINER],
    "extraManifests": [{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "other"}}],
    "tests.resources.limits.memory": "65Mi",
    "clientExample.bounceBytes": "1Mi",
    "clientExample.coherentBytes": "1Mi",
    "clientExample.every": "33s",
    "clientExample.resources.requests.cpu": "123m",
    "clientExample.resources.limits.memory": "65Mi",
}


def another(path, value):
    if path in OTHER:
        return OTHER[path]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, str):
        return "other"
    raise AssertionError(f"{path}: say in OTHER what else it could be")


def without_effect(chart):
    """Values that change nothing that is rendered, whatever they are."""
    all_values = merged(chart.values, EVERYTHING)
    rendered = chart.render(EVERYTHING)
    for path in leaves(chart.values):
        base = merged(EVERYTHING, ALONG.get(path, {}))
        value = another(path, get(all_values, path))
        before = chart.render(base) if path in ALONG else rendered
        if value == get(all_values, path):
            yield f"{path}: the other value {value!r} is the same"
        elif chart.render(merged(base, put(path, value))) == before:
            yield f"{path}: {value!r} instead of {get(all_values, path)!r} renders the same"
    yield from (f"OTHER names {path}, which is no value" for path in OTHER.keys() - set(leaves(chart.values)))


def references():
    """(file, path) for every value that a template names, variables that stand for a part of them resolved."""
    for file in sorted((CHART / "templates").rglob("*")):
        if file.is_dir():
            continue
        text = file.read_text()
        aliases = dict(re.findall(r"(\$\w+) := \$?\.Values\.([\w.]+) -?}}", text))
        name = file.relative_to(CHART / "templates")
        # `(.Values.global).x` is how a value is read that may not be there.
        text = re.sub(r"\((\$?\.Values\.\w+)\)", r"\1", text)
        for path in re.findall(r"\.Values\.([\w.]+)", text):
            yield name, path
        for alias, of in aliases.items():
            for path in re.findall(re.escape(alias) + r"\.([\w.]+)", text):
                yield name, f"{of}.{path}"


def unknown_references(values):
    found = set(references())
    if len(found) < 50:
        yield f"only {len(found)} references to values were found: the search is broken"
    for file, path in sorted(found):
        if path in FOREIGN or path in REFUSED:
            continue
        try:
            get(values, path)
        except (KeyError, TypeError):
            yield f"templates/{file} names .Values.{path}, which values.yaml does not have"


def schema_paths(schema, node, prefix=""):
    """Paths of the schema's properties, but not below lists, whose items values.yaml cannot show."""
    for key, below in node.get("properties", {}).items():
        path = f"{prefix}{key}"
        below = resolved(schema, below)
        if below.get("properties") and any(True for _ in schema_paths(schema, below)) and below.get("type") == "object":
            yield from schema_paths(schema, below, path + ".")
        else:
            yield path


def resolved(schema, node):
    return schema["$defs"][node["$ref"].removeprefix("#/$defs/")] | node if "$ref" in node else node


def schema_differences(schema, values):
    in_schema = set(schema_paths(schema, schema)) - FOREIGN - REFUSED
    in_values = set(leaves(values))
    # An empty dict of values whose keys the schema knows is one value.
    for path in {p for p in in_values if get(values, p) == {}}:
        in_schema = {path if p.startswith(path + ".") else p for p in in_schema}
    yield from (f"{path} is in the schema, not in values.yaml" for path in sorted(in_schema - in_values))
    yield from (f"{path} is in values.yaml, not in the schema" for path in sorted(in_values - in_schema))


# Objects that are Kubernetes' own or whose keys are the user's; everything else is closed.
OPEN = re.compile(
    r"^(\$defs\.(strings|container)|global(\.imagePullSecrets\[\])?|affinity\.\w+|networkPolicy\.metricsFrom\[\]\.\w+"
    r"|extra(Env|Volumes|VolumeMounts|Manifests)\[\])$"
)


def open_objects(schema):
    """Objects of the schema that would let an unknown key through, and nodes that say nothing of themselves."""

    def walk(node, path):
        if node.get("type") == "object" and node.get("additionalProperties") is not False and not OPEN.match(path):
            yield f"{path} lets unknown keys through"
        for key, below in node.get("properties", {}).items():
            where = f"{path}.{key}" if path else key
            if not below.keys() & {"type", "enum", "oneOf", "$ref"} and where not in REFUSED:
                yield f"{where} may be anything"
            if "description" not in resolved(schema, below) and not path.startswith("$defs"):
                yield f"{where} has no description"
            yield from walk(below, where)
        if "items" in node:
            yield from walk(node["items"], path + "[]")

    yield from walk(schema, "")
    for name, node in schema["$defs"].items():
        yield from walk(node, f"$defs.{name}")
