"""The example of one pod with a daemon of its own."""

from __future__ import annotations

import re

from chart import Chart
from stage import Stage, expect, until_ended

UID = "0f000000-0000-4000-8000-000000000001"


def serves_its_pod(stage: Stage, example: Chart) -> str:
    """The application starts when the sidecar answers, uses it, and verifies its bytes."""
    stage.node.apply(example.manifests)
    pod = stage.node.run(example.one("Pod"), UID)
    code, log = until_ended(pod, "app", 60)
    expect(code == 0, f"the app ended with {code}: {log}\n{pod.log('domaind')}")
    verified = re.search(r"^verified +(.*)$", log, re.M)
    moved = re.search(r"^file +(.*)$", log, re.M)
    expect(verified is not None and moved is not None, log)
    assert verified is not None and moved is not None
    sidecar = pod.container("domaind")
    expect(sidecar.runs and sidecar.asked.get("startup", 0) > 0, "the sidecar was not waited for")
    codes = stage.node.stop(pod)
    expect(codes == {"domaind": 0}, f"the sidecar, stopped last: {codes}")
    return f"{moved.group(1)}; {verified.group(1)}; sidecar stopped after the app, exit 0"
