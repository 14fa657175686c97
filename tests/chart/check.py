"""Everything about helm/domaind that can be checked without a cluster.

    check.py --readme-generator PROGRAM --domaind PROGRAM [--update]

Started by tests/chart.sh.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import helm_python as helm
import yaml

import admission
import config
import golden
import promises
import refusals
import sidecar
import usage
import validation
from chart import CHART, NAMESPACE, ROOT, Chart, cases, documents, merged
from report import Report
from validation import NEWEST, OLDEST


def main():
    args = arguments()
    # It prints every release of every rendering otherwise.
    helm.disable_logging()
    if args.update:
        readme(args.readme_generator, CHART / "README.md")
    report, chart = Report(), Chart()
    every = cases()
    report.check("there are at least seven ci/*-values.yaml", [] if len(every) >= 7 else [every])
    for case in every:
        check_case(report, chart, case, args)
    check_refusals(report, chart)
    check_names(report, chart)
    check_promises(report, chart)
    check_admission(report, chart)
    check_sidecar(report, args.domaind)
    report.check(
        "README.md is what readme-generator makes of values.yaml, and every value has its line",
        readme_differences(args.readme_generator),
    )
    report.check("Chart.yaml, files and versions agree", metadata_troubles(chart))
    report.check("the package renders the same, without ci/ and examples/", package_troubles(chart))
    return report.close()


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--readme-generator", type=Path, required=True)
    parser.add_argument("--domaind", type=Path, required=True)
    parser.add_argument("--update", action="store_true")
    return parser.parse_args()


def check_case(report, chart, case, args):
    name, values = case.name, merged(chart.values, case.values)
    texts = chart.render(case.values)
    docs = documents(texts)
    oldest = case.kubernetes or OLDEST
    report.check(f"{name}: strict lint, Kubernetes {oldest} and {NEWEST}", lint(case, oldest))
    for version in (oldest, NEWEST):
        report.check(
            f"{name}: {len(docs)} resources are valid for Kubernetes {version}, strictly",
            validation.invalid(docs, version),
        )
    namespaces = [values["namespaceOverride"] or NAMESPACE, values["metrics"]["podMonitor"]["namespace"]]
    # What extraManifests bring is the user's.
    ours = documents({path: text for path, text in texts.items() if path != "extra.yaml"})
    report.check(
        f"{name}: names, namespaces and labels",
        [*validation.duplicates(docs), *validation.metadata_troubles(ours, namespaces)],
    )
    if args.update:
        golden.update(case, texts)
    report.check(f"{name}: rendered as in examples/{name}/rendered", golden.differences(case, texts))
    report.check(f"{name}: pods may what they need, and no more", promises.what_pods_may(docs, values))
    report.check(f"{name}: the DaemonSet", promises.daemon_set(docs, values))
    report.check(f"{name}: probes and ports", promises.probes(docs, values))
    report.check(f"{name}: memory", promises.memory(docs, values))
    report.check(f"{name}: selectors", promises.selectors(docs))
    report.check(f"{name}: traffic", promises.network(docs, values))
    report.check(f"{name}: PodMonitor", promises.monitor(docs, values))
    report.check(f"{name}: accounts without rights or tokens", promises.accounts(docs, values))
    if values["clientExample"]["enabled"]:
        report.check(f"{name}: two pods share a domain", promises.example(docs, values))
    check_config(report, name, docs, values, args.domaind)


def check_config(report, name, docs, values, domaind):
    text = config.toml_of(docs)
    report.check(f"{name}: domaind.toml says what the values say", config.differences(text, values))
    report.check(f"{name}: domaind check-config takes it", config.refused(domaind, text))


def lint(case, oldest):
    for version in (oldest, NEWEST):
        said = helm.lint(CHART, case.values, strict=True, namespace=NAMESPACE, kube_version=f"v{version}.0")
        yield from said["errors"]
        # 1 is information.
        yield from (f"{each['path']}: {each['error']}" for each in said["messages"] if each["severity"] > 1)


def check_refusals(report, chart):
    table = refusals.table()
    for row in table:
        report.check(f"refused: {row['what']}", refusals.not_refused(chart, row))
    report.check("at least fifty values are refused", [] if len(table) >= 50 else [len(table)])


def check_names(report, chart):
    schema = json.loads((CHART / "values.schema.json").read_text())
    count = len(list(usage.leaves(chart.values)))
    report.check(f"each of {count} values changes what is rendered", usage.without_effect(chart))
    report.check("each value that a template names is in values.yaml", usage.unknown_references(chart.values))
    report.check("schema and values.yaml have the same values", usage.schema_differences(schema, chart.values))
    report.check("the schema lets nothing through that it does not know", usage.open_objects(schema))


def check_promises(report, chart):
    report.check("memory limits follow regions.maxBytes, to the byte", promises.arithmetic(chart))
    report.check("pods are replaced for the changes that config.restartFor says", promises.checksums(chart))
    report.check("the DaemonSet's selector never changes", promises.stable_selector(chart))
    report.check("names fit, however long the release's", promises.names(chart))
    report.check("NOTES.txt says what matters for the values", promises.notes(chart))


def check_admission(report, chart):
    (case,) = [case for case in cases() if case.name == "admission"]
    report.check(
        "admission: the policies are asked about pods, ephemeral containers and persistent volumes, and deny",
        admission.match_troubles(chart.documents(case.values)),
    )
    report.check(
        f"admission: {admission.rows()} pods and volumes and the chart's own pods are let in or refused as they should be",
        admission.troubles(chart, case.values),
    )


def check_sidecar(report, domaind):
    docs = sidecar.docs()
    for version in (OLDEST, NEWEST):
        report.check(f"sidecar: valid for Kubernetes {version}, strictly", validation.invalid(docs, version))
    report.check("sidecar: restricted, and its parts agree", sidecar.troubles(docs))
    text = config.toml_of(docs)
    report.check("sidecar: domaind check-config takes its configuration", config.refused(domaind, text))
    report.check(
        "domaind check-config refuses a configuration with a wrong key",
        [] if list(config.refused(domaind, text + "\n[nonsense]\nkey = 1\n")) else ["it takes it"],
    )


def readme(generator, file):
    subprocess.run(
        [generator.absolute(), "--values", CHART / "values.yaml", "--readme", file],
        check=True, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def readme_differences(generator):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "README.md"
        shutil.copy(CHART / "README.md", file)
        try:
            readme(generator, file)
        except subprocess.CalledProcessError as error:
            yield error.stdout + error.stderr
            return
        if file.read_text() != (CHART / "README.md").read_text():
            yield "tests/chart.sh --update writes it anew"


def package_troubles(chart):
    with tempfile.TemporaryDirectory() as folder:
        archive = helm.package(CHART, destination=folder)
        with tarfile.open(archive) as tar:
            names = tar.getnames()
        if Chart(Path(archive), chart.values).render({}) != chart.render({}):
            yield "it renders something else"
    yield from (f"it has {name} in it" for name in names if name.startswith(("domaind/ci/", "domaind/examples/")))
    for file in ("README.md", "UPGRADING.md", "values.schema.json"):
        if f"domaind/{file}" not in names:
            yield f"it has no {file}"


def metadata_troubles(chart):
    meta = yaml.safe_load((CHART / "Chart.yaml").read_text())
    workspace = (ROOT / "Cargo.toml").read_text()
    if f'\nversion = "{meta["appVersion"]}"\n' not in workspace:
        yield f"appVersion {meta['appVersion']} is not the workspace's version"
    if meta["kubeVersion"] != f">={OLDEST}.0-0":
        yield f"kubeVersion {meta['kubeVersion']}, but {OLDEST} is what is checked"
    images = yaml.safe_load(meta["annotations"]["artifacthub.io/images"])
    values = chart.values["image"]
    if [each["image"] for each in images] != [f"{values['registry']}/{values['repository']}:{meta['appVersion']}"]:
        yield f"artifacthub.io/images: {images}"
    for file in ("README.md", "UPGRADING.md", "values.schema.json", "templates/NOTES.txt"):
        if not (CHART / file).is_file():
            yield f"there is no {file}"
    if f"## {meta['version']}" not in (CHART / "UPGRADING.md").read_text():
        yield f"UPGRADING.md has no section {meta['version']}"
    for file in sorted((CHART / "templates").rglob("*")):
        if file.is_file():
            for word in ("lookup ", ".Capabilities"):
                if word in file.read_text():
                    yield f"{file.name} uses {word.strip()}, which renders differently without a cluster"


if __name__ == "__main__":
    sys.exit(main())
