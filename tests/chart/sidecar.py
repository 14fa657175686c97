"""The example of a pod with a daemon of its own, helm/domaind/examples/sidecar."""

import tomllib

import config
import security
from chart import CHART, documents, of_kind, pods

FOLDER = CHART / "examples/sidecar"


def docs():
    return documents({path.name: path.read_text() for path in sorted(FOLDER.glob("*.yaml"))})


def troubles(found):
    (pod,) = of_kind(found, "Pod")
    (name, meta, spec), = pods(found)
    yield from (f"it is less than restricted: {each}" for each in sorted(security.deviations(spec)))
    yield from security.careless(name, meta, spec)
    (sidecar,) = [each for each in spec["initContainers"] if each.get("restartPolicy") == "Always"]
    if "startupProbe" not in sidecar:
        yield "the application may start before the daemon serves"
    if spec.get("shareProcessNamespace") is not True:
        yield "the daemon cannot see the application's processes, and would refuse them"
    toml = tomllib.loads(config.toml_of(found))
    yield from agreement(spec, sidecar, toml)


def agreement(spec, sidecar, toml):
    """The configuration and the pod say the same."""
    (app,) = spec["containers"]
    users = {each["name"]: each["securityContext"]["runAsUser"] for each in (sidecar, app)}
    if len(set(users.values())) != 2:
        yield f"daemon and application are the same user: {users}"
    if toml["server"]["client_gid"] not in spec["securityContext"]["supplementalGroups"]:
        yield f"nobody is in group {toml['server']['client_gid']}"
    (volume,) = [each["name"] for each in spec["volumes"] if "emptyDir" in each]
    places = {each["name"]: mount for each in (sidecar, app) for mount in each["volumeMounts"] if mount["name"] == volume}
    if len({mount["mountPath"] for mount in places.values()}) != 1 or not places[app["name"]].get("readOnly"):
        yield f"the sockets are mounted as {places}"
    # The daemon refuses a directory that is not its own: an emptyDir is root's, so it makes one inside.
    runtime_dir, mount = toml["runtime_dir"], places[sidecar["name"]]["mountPath"]
    if not runtime_dir.startswith(mount + "/"):
        yield f"the runtime directory {runtime_dir} is not below the volume at {mount}"
    env = {each["name"]: each["value"] for each in app["env"]}
    if env.get("DOMAIND_RUNTIME_DIR") != runtime_dir:
        yield f"the application looks in {env}"
    limit = config.size(sidecar["resources"]["limits"]["memory"])
    needed = config.memory_needed(config.size(toml["limits"]["region_bytes"])) << 20
    if limit < needed:
        yield f"limit {limit}, needed are {needed}"
