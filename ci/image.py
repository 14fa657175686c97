"""Checks an image archive against what is promised of it. See `ci/image`."""

import gzip
import hashlib
import io
import json
import sys
import tarfile

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

FILES = {
    "usr/bin/domaind": 0o755,
    "usr/bin/domainctl": 0o755,
    "etc/domaind/domaind.toml": 0o644,
    "etc/group": 0o644,
    "etc/passwd": 0o644,
    "usr/share/doc/domaind/LICENSE-APACHE": 0o644,
    "usr/share/doc/domaind/LICENSE-MIT": 0o644,
    "usr/share/doc/domaind/sbom.cdx.json": 0o644,
}


def main(archive):
    blobs, index = read(archive)
    manifest = json.loads(blob(blobs, index["manifests"][0]))
    config = json.loads(blob(blobs, manifest["config"]))
    (packed,) = manifest["layers"]
    layer = gzip.decompress(blob(blobs, packed))
    same("diff ids", config["rootfs"]["diff_ids"], ["sha256:" + hashlib.sha256(layer).hexdigest()])
    told = config["config"]
    same("user", told["User"], "65532:65532")
    same("command", told["Entrypoint"] + told["Cmd"], ["/usr/bin/domaind", "serve"])
    print("ok: every blob has the digest that names it; the image runs `domaind serve` as 65532:65532")

    files = contents(layer)
    for name in ("usr/bin/domaind", "usr/bin/domainctl"):
        same(f"{name} begins", files[name][:4], b"\x7fELF")
    commit = told["Labels"]["org.opencontainers.image.revision"]
    if commit.encode() not in files["usr/bin/domaind"]:
        sys.exit(f"domaind does not know that it was built from {commit}")
    print(f"ok: {len(files)} files and nothing else, all of them root's: {', '.join(sorted(files))}")

    check_sbom(files["usr/share/doc/domaind/sbom.cdx.json"].decode())


def read(archive):
    with tarfile.open(archive) as tar:
        files = {entry.name: tar.extractfile(entry).read() for entry in tar if entry.isfile()}
    same("layout", json.loads(files["oci-layout"]), {"imageLayoutVersion": "1.0.0"})
    blobs = {name.removeprefix("blobs/sha256/"): content
             for name, content in files.items() if name.startswith("blobs/")}
    for name, content in blobs.items():
        same("digest", hashlib.sha256(content).hexdigest(), name)
    return blobs, json.loads(files["index.json"])


def blob(blobs, descriptor):
    content = blobs[descriptor["digest"].removeprefix("sha256:")]
    same("size", len(content), descriptor["size"])
    return content


def contents(layer):
    with tarfile.open(fileobj=io.BytesIO(layer)) as tar:
        entries = tar.getmembers()
        same("entries but files and directories", [e.name for e in entries if not (e.isfile() or e.isdir())], [])
        same("owners", {(e.uid, e.gid) for e in entries}, {(0, 0)})
        same("times", len({e.mtime for e in entries}), 1)
        same("files", {e.name: e.mode for e in entries if e.isfile()}, FILES)
        return {e.name: tar.extractfile(e).read() for e in entries if e.isfile()}


def check_sbom(text):
    validator = JsonStrictValidator(SchemaVersion.V1_5)
    # A validator that finds fault with nothing would find none here either.
    if validator.validate_str(json.dumps({**json.loads(text), "components": [{"name": "no type"}]})) is None:
        sys.exit("the validator lets a component without a type pass")
    if error := validator.validate_str(text):
        sys.exit(f"sbom.cdx.json is not CycloneDX 1.5: {error}")
    document = json.loads(text)
    refs = {part["bom-ref"] for part in document["components"]} | {"domaind"}
    same("parts with dependencies", {entry["ref"] for entry in document["dependencies"]}, refs)
    names = {part["name"] for part in document["components"]}
    for name in ("domaind-server", "domainctl", "domain-core", "tokio", "tonic", "rust-std"):
        if name not in names:
            sys.exit(f"sbom.cdx.json leaves out {name}")
    # What only builds or tests is not in the programs.
    for name in ("protox", "tonic-prost-build", "proptest", "serde_derive", "domaind-tests"):
        if name in names:
            sys.exit(f"sbom.cdx.json lists {name}, which is not linked")
    print(f"ok: sbom.cdx.json is CycloneDX 1.5 and lists {len(document['components'])} parts, each with its dependencies")


def same(what, found, expected):
    if found != expected:
        sys.exit(f"{what}: found {found!r}, expected {expected!r}")


if __name__ == "__main__":
    main(sys.argv[1])
