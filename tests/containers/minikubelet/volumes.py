"""Volumes, made on the host below the pod's directory as a kubelet makes them."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import time
from pathlib import Path

from .cri import api
from .spec import Container, Pod, Volume
from .strict import NotUnderstood

PROPAGATION = {"None": api.PROPAGATION_PRIVATE, "HostToContainer": api.PROPAGATION_HOST_TO_CONTAINER}


class MountFailed(Exception):
    """A volume that is not there, or not what it should be. A kubelet would try again."""


class Volumes:
    """The volumes of one pod."""

    def __init__(
        self, pod: Pod, directory: Path, config_maps: dict[str, dict[str, str]], prefixes: dict[str, Path]
    ) -> None:
        self._pod = pod
        self._directory = directory
        self._config_maps = config_maps
        self._prefixes = prefixes
        self._paths: dict[str, Path] = {}
        self._mounted: list[Path] = []

    def make(self) -> None:
        for volume in self._pod.volumes:
            make = {"configMap": self._config_map, "hostPath": self._host_path, "emptyDir": self._empty_dir}
            self._paths[volume.name] = make[volume.kind](volume)

    def update(self) -> None:
        """What an hour of a kubelet does: config maps as they are now."""
        for volume in self._pod.volumes:
            if volume.kind == "configMap":
                self._fill(volume, self._paths[volume.name])

    def path(self, name: str) -> Path:
        return self._paths[name]

    def mounts(self, container: Container) -> list[api.Mount]:
        mounts = []
        for mount in container.mounts:
            if mount.name not in self._paths:
                raise NotUnderstood(f"{container.name}: there is no volume {mount.name!r}")
            source = self._paths[mount.name] / mount.sub_path
            if not source.exists():
                raise MountFailed(f"{container.name}: {source} is not there")
            mounts.append(
                api.Mount(
                    container_path=mount.mount_path,
                    host_path=str(source),
                    readonly=mount.read_only,
                    propagation=PROPAGATION[mount.propagation],
                )
            )
        return mounts

    def remove(self) -> None:
        for path in reversed(self._mounted):
            subprocess.run(["umount", str(path)], check=True)
        self._mounted.clear()
        shutil.rmtree(self._directory, ignore_errors=True)

    def on_host(self, path: str) -> Path:
        """Where a path of the host lies: some prefixes are kept away from the machine's own."""
        for prefix, place in self._prefixes.items():
            if path == prefix or path.startswith(prefix + "/"):
                return place / path[len(prefix) :].lstrip("/")
        raise NotUnderstood(f"hostPath {path!r} lies below none of {sorted(self._prefixes)}")

    def _host_path(self, volume: Volume) -> Path:
        path = self.on_host(volume.host_path)
        kind = volume.host_type
        if kind == "DirectoryOrCreate" and not path.exists():
            path.mkdir(mode=0o755, parents=True)
        checks = {
            "": lambda: True,
            "Directory": path.is_dir,
            "DirectoryOrCreate": path.is_dir,
            "Socket": path.is_socket,
        }
        if kind not in checks:
            raise NotUnderstood(f"hostPath of type {kind!r}")
        if not checks[kind]():
            raise MountFailed(f"hostPath type check failed: {volume.host_path} is not a {kind}")
        return path

    def _empty_dir(self, volume: Volume) -> Path:
        path = self._directory / "volumes" / volume.name
        path.mkdir(parents=True)
        if volume.in_memory:
            size = [] if volume.size_limit is None else ["-o", f"size={volume.size_limit}"]
            subprocess.run(["mount", "-t", "tmpfs", *size, "tmpfs", str(path)], check=True)
            self._mounted.append(path)
        path.chmod(0o777)
        self._give_to_group(path)
        return path

    def _config_map(self, volume: Volume) -> Path:
        path = self._directory / "volumes" / volume.name
        path.mkdir(parents=True)
        path.chmod(0o755)
        self._fill(volume, path)
        return path

    def _fill(self, volume: Volume, path: Path) -> None:
        """All files change at once, by a link, as on a node."""
        data = self._config_maps.get(volume.config_map)
        if data is None:
            if not volume.optional:
                raise MountFailed(f"there is no ConfigMap {volume.config_map!r}")
            data = {}
        names = volume.item_paths or {key: key for key in data}
        version = path / f"..{time.time_ns()}"
        version.mkdir(mode=0o755)
        for key, name in names.items():
            if key not in data:
                raise MountFailed(f"ConfigMap {volume.config_map!r} has no key {key!r}")
            file = version / name
            file.write_text(data[key])
            file.chmod(volume.mode)
            self._give_to_group(file)
            link = path / name
            if not link.is_symlink():
                link.symlink_to(f"..data/{name}")
        fresh = path / "..data_tmp"
        fresh.symlink_to(version.name)
        before = os.readlink(path / "..data") if (path / "..data").is_symlink() else None
        fresh.rename(path / "..data")
        if before:
            shutil.rmtree(path / before)

    def _give_to_group(self, path: Path) -> None:
        """`fsGroup`: the group may what the owner may, and new files are the group's."""
        if self._pod.fs_group is None:
            return
        os.chown(path, -1, self._pod.fs_group)
        mode = stat.S_IMODE(path.stat().st_mode) | 0o660
        if path.is_dir():
            mode |= stat.S_ISGID | 0o110
        path.chmod(mode)
