"""A containerd of our own, below one directory, with nothing of the machine's."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from .cri import Runtime

CONFIG = """\
version = 2
root = "{home}/root"
state = "{home}/state"
# The first would make a directory of the machine's own.
disabled_plugins = ["io.containerd.internal.v1.opt"]

[grpc]
  address = "{home}/c.sock"

[ttrpc]
  address = "{home}/t.sock"

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  # Where the machine itself may not lower a score, nobody here may.
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{home}/cni/bin"
    conf_dir = "{home}/cni/conf"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    # Works on every file system; nothing here is large.
    snapshotter = "native"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
        Root = "{home}/runc"
"""
START_LIMIT_S = 30


class Containerd:
    """The process, and its command `ctr`."""

    def __init__(self, home: Path, pause_image: str) -> None:
        self._socket = home / "c.sock"
        config = home / "config.toml"
        config.write_text(CONFIG.format(home=home, pause=pause_image))
        self._log = (home / "containerd.log").open("wb")
        self._process = subprocess.Popen(
            ["containerd", "--config", str(config)], stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log
        )
        self.log_path = home / "containerd.log"

    def connect(self) -> Runtime:
        deadline = time.monotonic() + START_LIMIT_S
        while not self._socket.exists():
            if self._process.poll() is not None:
                raise RuntimeError(
                    f"containerd ended with {self._process.returncode}: {self.log_path.read_text()[-3000:]}"
                )
            if time.monotonic() > deadline:
                raise RuntimeError(f"containerd has no socket after {START_LIMIT_S} s")
            time.sleep(0.05)
        return Runtime(self._socket)

    def import_image(self, archive: Path) -> None:
        """All of them: an archive may name itself or not."""
        command = ["ctr", "-a", str(self._socket), "-n", "k8s.io", "images", "import", "--snapshotter", "native"]
        done = subprocess.run([*command, "--digests", str(archive)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"ctr images import {archive}: {done.stderr}{done.stdout}")

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
