"""The chart, rendered by Helm's own code."""

import copy
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import helm_python as helm
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm/domaind"
# Names of nobody: a chart that wrote one of them down would show.
RELEASE, NAMESPACE = "node", "domaind-system"


def merged(below, above):
    """Values as Helm merges them: dicts by key, everything else as a whole."""
    out = copy.deepcopy(below)
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(out.get(key), dict):
            out[key] = merged(out[key], value)
        else:
            out[key] = copy.deepcopy(value)
    return out


class Chart:
    """A folder or a package. Closed when the process ends."""

    def __init__(self, path=CHART, values=None):
        self.handle = helm.Chart.load(path)
        self.values = values or yaml.safe_load((path / "values.yaml").read_text())

    def render(self, values, release=RELEASE):
        """What an install would do: the schema, then the templates.

        Answers a text for each template that has one; raises a HelmError.
        """
        self.handle.validate_schema(values)
        rendered = self.handle.render(values, name=release, namespace=NAMESPACE)
        prefix = f"{self.handle.name}/templates/"
        texts = {path.removeprefix(prefix): text for path, text in sorted(rendered.items())}
        return {path: text for path, text in texts.items() if is_something(text)}

    def documents(self, values, release=RELEASE):
        return documents(self.render(values, release))


def is_something(text):
    """Has it more than blank lines and comments?"""
    return any(line.strip() and not line.lstrip().startswith("#") for line in text.splitlines())


def documents(texts):
    """Every resource of rendered templates."""
    found = []
    for path, text in texts.items():
        if path.endswith(".yaml"):
            found += [document for document in yaml.safe_load_all(text) if document]
    return found


@dataclass(frozen=True)
class Case:
    """One ci/NAME-values.yaml."""

    name: str
    path: Path

    @cached_property
    def text(self):
        return self.path.read_text()

    @cached_property
    def values(self):
        return yaml.safe_load(self.text)

    @cached_property
    def kubernetes(self):
        """The oldest version whose API has what the case asks for."""
        said = re.search(r"^# kubernetes: (\d+\.\d+)$", self.text, re.MULTILINE)
        return said[1] if said else None

    @cached_property
    def rendered(self):
        return CHART / "examples" / self.name / "rendered"


def cases():
    suffix = "-values.yaml"
    paths = sorted((CHART / "ci").glob("*" + suffix))
    return [Case(path.name.removesuffix(suffix), path) for path in paths]


def leaves(values, prefix=""):
    """Paths of all values that are no dicts, or empty ones."""
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and value and path not in WHOLE:
            yield from leaves(value, path + ".")
        else:
            yield path


# Dicts whose keys are the user's.
WHOLE = {"nodeSelector"}


def put(path, value):
    """Values that say nothing but this."""
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def get(values, path):
    for key in path.split("."):
        values = values[key]
    return values


def of_kind(docs, kind):
    return [doc for doc in docs if doc["kind"] == kind]


def pod_of(doc):
    """The pod that a resource is or makes, as (name, metadata, spec); None for others."""
    name = f"{doc['kind']} {doc['metadata']['name']}"
    if doc["kind"] == "Pod":
        return name, doc["metadata"], doc["spec"]
    template = doc.get("spec", {}).get("template") if isinstance(doc.get("spec"), dict) else None
    return (name, template["metadata"], template["spec"]) if template else None


def pods(docs):
    return [pod for pod in map(pod_of, docs) if pod]
