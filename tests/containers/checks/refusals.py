"""Who may not, and what a client's container cannot do."""

from __future__ import annotations

import re

from chart import variant
from minikubelet.pod import RunningPod
from stage import RUN, Stage, expect, until_ended

#: A user and a pod that a rule of `run.py` names together, and a domain for them.
BOUND, BOUND_USER, BOUND_POD = "bound", 20_011, "0c000000-0000-4000-8000-000000000001"
OTHER_POD = "0c000000-0000-4000-8000-000000000002"
STRANGER, STRANGER_POD = 20_021, "0c000000-0000-4000-8000-000000000003"
WRONG_ROLE_POD = "0c000000-0000-4000-8000-000000000004"
LATE_POD = "0c000000-0000-4000-8000-000000000006"
INTRUDER_POD = "0c000000-0000-4000-8000-000000000005"
INTRUDER_IMAGE = "localhost/intruder:1"
DENIED = 4


def strangers(stage: Stage) -> str:
    """A pod that no rule is about is told so, also of domains that do not exist."""
    said = []
    for domain in (stage.domain, "not-there"):
        pod = attempt(stage, "stranger", domain, "device", STRANGER, STRANGER_POD)
        said.append(refused(stage, pod, domain))
    expect(anonymous(said[0], stage.domain) == anonymous(said[1], "not-there"), f"it can tell them apart: {said}")
    return said[0]


def pods_of_one_user(stage: Stage) -> str:
    """Of two pods of one user only that of the rule may attach."""
    pod = attempt(stage, "other-pod", BOUND, "device", BOUND_USER, OTHER_POD)
    said = refused(stage, pod, BOUND)
    # Nobody drives there: who may attach waits, and gives up.
    pod = attempt(stage, "right-pod", BOUND, "device", BOUND_USER, BOUND_POD)
    code, log = until_ended(pod, "device")
    expect(code == 5 and f"attached to domains/{BOUND}" in log, f"the right pod: {code}: {log}")
    stage.node.stop(pod)
    expect(stage.audit(event="attach", result="granted", pod_uid=BOUND_POD, rule="bound") != [], "no audit line")
    return f"pod {BOUND_POD[:8]}…1 attached, pod …2 of uid {BOUND_USER}: {said}"


def wrong_role(stage: Stage) -> str:
    """A pod whose rule says `device` is no driver."""
    user = stage.device.spec.containers[0].security.run_as_user
    assert user is not None
    pod = attempt(stage, "wrong-role", stage.domain, "driver", user, WRONG_ROLE_POD, "/usr/bin/domaind")
    said = refused(stage, pod, stage.domain)
    rule = next(
        line for line in stage.audit(event="attach", result="granted", domain=stage.domain) if line["role"] == "device"
    )
    expect(str(rule["rule"]) in said, f"it does not name the rule {rule['rule']}: {said}")
    return said


def reload_lets_in(stage: Stage) -> str:
    """A rule that is added to the ConfigMap counts after a reload, and nobody notices else."""
    rule = f'\n[[policy.rules]]\nname = "late"\nuids = [{STRANGER}]\ndomains = ["{stage.domain}"]\nroles = ["device"]\n'
    stage.chart.edit_config(lambda text: text + rule)
    stage.node.apply(stage.chart.manifests)
    # Till the kubelet gets to it nothing has changed.
    refused(stage, attempt(stage, "early", stage.domain, "device", STRANGER, STRANGER_POD), stage.domain)
    stage.daemon.volumes.update()
    code, said = stage.ctl("reload")
    expect(code == 0, f"domainctl reload: {code}: {said}")
    pod = attempt(stage, "late", stage.domain, "device", STRANGER, LATE_POD)
    code, log = until_ended(pod, "device")
    stage.node.stop(pod)
    # The only seat is taken: it attaches, and waits in vain.
    expect(code == 5 and f"attached to domains/{stage.domain}" in log, f"{code}: {log}")
    expect(stage.audit(event="attach", result="granted", pod_uid=LATE_POD, rule="late") != [], "no audit line")
    for client, name in ((stage.driver, "driver"), (stage.device, "device")):
        expect("lost: " not in client.log(name), client.log(name))
    return 'a pod that was refused attaches by rule "late"; driver and device go on undisturbed'


def anonymous(text: str, domain: str) -> str:
    """Without what differs from one attempt to the next anyhow: process, container, the name asked for."""
    return re.sub(r"\bpid \d+|\b[0-9a-f]{12,64}\b", "…", text.replace(domain, "…"))


def attempt(stage: Stage, name: str, domain: str, role: str, user: int, uid: str, *rest: str) -> RunningPod:
    """A pod like the example's device, as somebody, trying once."""
    args = ["demo", "-v", "--domain", domain, "--role", role, "--wait", "1s", *rest]
    return stage.node.run(variant(stage.chart.one("Deployment", "-device"), name, args=args, user=user, once=True), uid)


def refused(stage: Stage, pod: RunningPod, domain: str) -> str:
    """It was, with a reason; what it was told. The pod is gone then."""
    code, log = until_ended(pod, "device")
    container = pod.container("device").ids[-1]
    stage.node.stop(pod)
    expect(code == DENIED and "reason: NOT_ALLOWED" in log, f"{pod.spec.name}: exit {code}: {log}")
    denied = stage.audit(
        event="attach", result="denied", pod_uid=pod.identity.uid, container_id=container, domain=domain
    )
    expect(denied != [] and denied[-1].get("reason") == "NOT_ALLOWED", f"no audit line: {stage.audit()}")
    return next(line for line in log.splitlines() if line.startswith("error: ")).removeprefix("error: ")


def intruder(stage: Stage) -> str:
    """From a client's container there is no way to the directory, the operator's socket or the daemon itself."""
    manifest = variant(
        stage.chart.one("Deployment", "-device"), "intruder", args=[RUN], image=INTRUDER_IMAGE, once=True
    )
    pod = stage.node.run(manifest, INTRUDER_POD)
    code, log = until_ended(pod, "device")
    stage.node.stop(pod)
    expect(code == 0, f"{code}: {log}")
    lines = log.splitlines()
    may = {"connect to public/api.sock", "connect to public/fd.sock"}
    did = {line.removesuffix(": ok") for line in lines if line.endswith(": ok")}
    expect(did == may, f"it could {sorted(did)}: {log}")
    expect("processes called domaind: 0 seen, descriptors of 0" in lines, log)
    why = {line.split(": ")[0]: line.split(": ", 1)[1] for line in lines}
    expect(why["create a file in public"] == "Read-only file system", log)
    expect(why["connect to admin/admin.sock"] == "No such file or directory", log)
    return f"{len(lines) - len(may) - 1} attempts failed; it sees no process domaind, and may only connect"
