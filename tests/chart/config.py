"""The rendered domaind.toml: says what the values say, and is what the real daemon reads."""

import json
import re
import subprocess
import tempfile
import tomllib
from pathlib import Path

FACTORS = {"": 1, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}


def size(value):
    digits, unit = re.fullmatch(r"(\d+)([KMGT]i|)", str(value)).groups()
    return int(digits) * FACTORS[unit]


def memory_needed(max_bytes):
    """In whole Mi, so that the daemon lets regions have all of `max_bytes`: it keeps an eighth of its memory for itself."""
    regions = size(max_bytes)
    return -(-max(-(-regions * 8 // 7), regions + (64 << 20)) // (1 << 20))


def toml_of(docs):
    (text,) = [doc["data"]["domaind.toml"] for doc in docs if "domaind.toml" in doc.get("data", {})]
    return text


def expected(values):
    """What the file has to say, from all values, chart's defaults included."""
    config, policy, example = values["config"], values["policy"], values["clientExample"]
    want = {
        "config_version": 1,
        "runtime_dir": "/run/domaind",
        "server": {"client_gid": values["sockets"]["gid"]},
        "limits": {"region_bytes": size(values["regions"]["maxBytes"]), "ack_timeout_ms": config["ackTimeoutMs"]},
        "log": config["log"],
        "policy": {
            "default": policy["default"],
            "advisory_read_only": policy["advisoryReadOnly"],
            "allow_unattested": values["identity"]["mode"] == "uid",
        },
    }
    if config["workerThreads"]:
        want["server"]["worker_threads"] = config["workerThreads"]
    if values["metrics"]["enabled"]:
        want["metrics"] = {"listen": f"{values['metrics']['address']}:{values['metrics']['port']}"}
    rules = [{snake(key): value for key, value in rule.items()} for rule in policy["rules"]]
    domains = [domain(given) for given in values["declaredDomains"]]
    if example["enabled"]:
        for role in ("driver", "device"):
            rules.append({"name": f"client-example-{role}", "uids": [example[role]["runAsUser"]],
                          "domains": [example["domain"]], "roles": [role]})  # fmt: skip
        sizes = {key: example[key] for key in ("bounceBytes", "coherentBytes")}
        domains.append(domain({"name": example["domain"]} | sizes))
    if rules:
        want["policy"]["rules"] = rules
    if domains:
        want["domains"] = domains
    return want


def domain(given):
    out = {}
    for key, value in given.items():
        if key in ("bounceBytes", "coherentBytes", "granuleBytes", "leaseBytes"):
            value = size(value)
        elif key == "quotas":
            value = domain(value)
        out[snake(key)] = value
    return out


def snake(name):
    return re.sub(r"[A-Z]", lambda found: "_" + found[0].lower(), name)


def differences(text, values):
    found, want = tomllib.loads(text), expected(values)
    # As text: to Python 1.0 is 1, to the daemon it is not.
    if json.dumps(found, sort_keys=True) != json.dumps(want, sort_keys=True):
        yield f"it says {found}, the values say {want}"


def refused(domaind, text):
    """What `domaind check-config` says against it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "domaind.toml"
        file.write_text(text)
        done = subprocess.run(
            [domaind, "check-config", "--config", file], capture_output=True, text=True, timeout=30
        )
    if done.returncode:
        yield f"exit {done.returncode}: {done.stdout}{done.stderr}"
