"""Image archives: making small ones, and knowing what the runtime will call them."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path


def make(archive: Path, name: str, files: dict[str, Path], entrypoint: list[str]) -> None:
    """An archive as `docker save` writes it, of some programs."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        for target, source in files.items():
            entry = tar.gettarinfo(source, target.lstrip("/"))
            entry.uid = entry.gid = 0
            entry.uname = entry.gname = ""
            entry.mode = 0o755
            with source.open("rb") as file:
                tar.addfile(entry, file)
    data = layer.getvalue()
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Entrypoint": entrypoint},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(data).hexdigest()}"]},
        }
    ).encode()
    manifest = json.dumps([{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]).encode()
    with tarfile.open(archive, "w") as tar:
        for entry_name, content in (("layer.tar", data), ("config.json", config), ("manifest.json", manifest)):
            entry = tarfile.TarInfo(entry_name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def image_id(archive: Path) -> str:
    """The digest of its configuration, which is what the runtime knows it by."""
    with tarfile.open(archive) as tar:
        names = set(tar.getnames())
        if "index.json" in names:
            index = json.loads(read(tar, "index.json"))
            manifest = json.loads(read(tar, blob(index["manifests"][0]["digest"])))
            return str(manifest["config"]["digest"])
        config = json.loads(read(tar, "manifest.json"))[0]["Config"]
        return f"sha256:{hashlib.sha256(read(tar, config)).hexdigest()}"


def blob(digest: str) -> str:
    algorithm, _, name = digest.partition(":")
    return f"blobs/{algorithm}/{name}"


def read(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(name)
    if file is None:
        raise ValueError(f"{name} is no file")
    return file.read()
