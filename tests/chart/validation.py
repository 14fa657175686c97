"""What Kubernetes itself would say of the shape of a resource."""

import json
from pathlib import Path

import jsonschema
import kubernetes_validate

OLDEST, NEWEST = "1.29", kubernetes_validate.latest_version()
CUSTOM = {
    ("monitoring.coreos.com/v1", "PodMonitor"): json.loads(
        (Path(__file__).parent / "podmonitor.schema.json").read_text()
    )
}


def invalid(docs, version):
    """Strictly: unknown fields are troubles, too."""
    for doc in docs:
        name = f"{doc['kind']} {doc['metadata']['name']}"
        custom = CUSTOM.get((doc["apiVersion"], doc["kind"]))
        try:
            if custom:
                jsonschema.validate(doc, custom)
            else:
                kubernetes_validate.validate(doc, version, strict=True)
        except (jsonschema.ValidationError, kubernetes_validate.ValidationError) as error:
            yield f"{name}: {error.message} at {list(error.path)}"
        except kubernetes_validate.SchemaNotFoundError:
            yield f"{name}: Kubernetes {version} has no {doc['apiVersion']} {doc['kind']}"


def duplicates(docs):
    seen = set()
    for doc in docs:
        name = (doc["apiVersion"], doc["kind"], doc["metadata"].get("namespace"), doc["metadata"]["name"])
        if name in seen:
            yield f"{name} is there twice"
        seen.add(name)


def metadata_troubles(docs, namespaces):
    """Labels that every resource has, names that fit, and namespaces that were asked for."""
    wanted = {"app.kubernetes.io/" + key for key in ("name", "instance", "component", "version", "managed-by")}
    for doc in docs:
        meta = doc["metadata"]
        name = f"{doc['kind']} {meta['name']}"
        missing = wanted - meta.get("labels", {}).keys()
        if missing:
            yield f"{name} has no labels {sorted(missing)}"
        if len(meta["name"]) > 63:
            yield f"{name}: {len(meta['name'])} characters"
        cluster_wide = doc["kind"].startswith("ValidatingAdmissionPolicy")
        if cluster_wide != ("namespace" not in meta) or meta.get("namespace", namespaces[0]) not in namespaces:
            yield f"{name} is in namespace {meta.get('namespace')}"
