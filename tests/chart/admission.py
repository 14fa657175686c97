"""The admission policies, evaluated by a CEL runtime as the API server would: conditions, variables, validations."""

import copy

from cel_expr_python import cel
from cel_expr_python.ext import ext_strings

from chart import NAMESPACE, of_kind, pods

PUBLIC = "/run/domaind/public"


def environment():
    names = {"object": cel.Type.DYN, "request": cel.Type.DYN, "variables": cel.Type.DYN}
    return cel.NewEnv(variables=names, extensions=[ext_strings.ExtStrings()])


class Policy:
    """One ValidatingAdmissionPolicy; every expression is compiled once."""

    def __init__(self, doc):
        self.env = environment()
        spec = doc["spec"]
        self.conditions = [self.env.compile(each["expression"]) for each in spec.get("matchConditions", [])]
        self.variables = [(each["name"], self.env.compile(each["expression"])) for each in spec["variables"]]
        self.validations = [
            (
                self.env.compile(each["expression"]),
                self.env.compile(each["messageExpression"]) if "messageExpression" in each else each["message"],
            )
            for each in spec["validations"]
        ]

    def says(self, namespace, obj):
        """The messages of all validations that do not hold."""
        data = {"object": obj, "request": {"namespace": namespace}, "variables": {}}

        def value(expression):
            result = expression.eval(data=data).plain_value()
            if isinstance(result, Exception) or expression_failed(result):
                raise ValueError(f"an expression fails: {result}")
            return result

        if not all(value(condition) is True for condition in self.conditions):
            return []
        for name, expression in self.variables:
            data["variables"][name] = value(expression)
        messages = []
        for expression, message in self.validations:
            holds = value(expression)
            if holds is not True:
                messages.append(message if isinstance(message, str) else value(message))
        return messages


def expression_failed(result):
    return type(result).__name__ not in ("bool", "str", "list", "dict", "int")


def pod(*paths, account="app", read_only=True, where="containers", **more):
    """A pod that mounts these directories of its node in one container."""
    mounts = []
    for index, _ in enumerate(paths):
        mount = {"name": f"v{index}", "mountPath": f"/m{index}"}
        mounts.append(mount | ({} if read_only is None else {"readOnly": read_only}))
    spec = {
        "serviceAccountName": account,
        "containers": [{"name": "app", "image": "x"}],
        "volumes": [{"name": f"v{index}", "hostPath": {"path": path}} for index, path in enumerate(paths)],
    }
    spec.setdefault(where, []).append({"name": "extra", "image": "x", "volumeMounts": mounts})
    return {"metadata": {"name": "p"}, "spec": spec | more}


def volume(**source):
    return {"metadata": {"name": "pv"}, "spec": source}


LISTED = "admissionPolicy of its chart lists who may"
ONLY_PUBLIC = f"only {PUBLIC} may be mounted"
READ_ONLY = "readOnly true only"
ABOVE = "a directory above"

# (what, namespace, pod, words of the refusal or None)
PODS = [
    ("a pod without volumes", "default", {"metadata": {}, "spec": {"containers": [{"name": "a"}]}}, None),
    ("a directory of others", "default", pod("/var/log", read_only=False), None),
    ("a directory whose name only begins like ours", "default", pod("/run/domaind-other", read_only=False), None),
    ("a listed namespace", "storage", pod(PUBLIC), None),
    ("a listed account", "network", pod(PUBLIC, account="vhost"), None),
    ("a listed pod, written with a slash at the end", "storage", pod(PUBLIC + "/"), None),
    ("a listed pod by way of /var/run", "storage", pod("/var" + PUBLIC), None),
    ("a node agent of kube-system and the whole node", "kube-system", pod("/", read_only=False), None),
    ("an emptyDir that is written to", "storage", pod(
        PUBLIC, volumes=[{"name": "v0", "emptyDir": {}}], read_only=False), None),
    ("another namespace", "default", pod(PUBLIC), LISTED),
    ("another account of a namespace with a listed one", "network", pod(PUBLIC, account="other"), LISTED),
    ("a listed account's name in another namespace", "default", pod(PUBLIC, account="vhost"), LISTED),
    ("the daemon's account name in another namespace", "default", pod("/run/domaind", account="node-domaind"), LISTED),
    ("another account of the daemon's namespace", NAMESPACE, pod("/run/domaind"), LISTED),
    ("an unlisted pod with double slashes", "default", pod("//run//domaind///public"), LISTED),
    ("an unlisted pod with dots", "default", pod("/./run/./domaind/public/."), LISTED),
    ("an unlisted pod by way of /var/run", "default", pod("/var/run/domaind/public"), LISTED),
    ("an unlisted pod by way of /var//run", "default", pod("/var//run/./domaind"), LISTED),
    ("an unlisted pod, the second of two volumes", "default", pod("/var/log", PUBLIC), LISTED),
    ("an unlisted pod that mounts it nowhere yet", "default", pod(PUBLIC, containers=[{"name": "a"}]), LISTED),
    ("a listed pod and all of the directory", "storage", pod("/run/domaind"), ONLY_PUBLIC),
    ("a listed pod and the operator's part", "storage", pod("/run/domaind/admin"), ONLY_PUBLIC),
    ("a listed pod and a single socket", "storage", pod(PUBLIC + "/api.sock"), ONLY_PUBLIC),
    ("a listed pod that may write", "storage", pod(PUBLIC, read_only=False), READ_ONLY),
    ("a listed pod that does not say read-only", "storage", pod(PUBLIC, read_only=None), READ_ONLY),
    ("an init container that may write", "storage", pod(PUBLIC, read_only=False, where="initContainers"), READ_ONLY),
    ("an ephemeral container that may write", "storage", pod(
        PUBLIC, read_only=False, where="ephemeralContainers"), READ_ONLY),
    ("the directory above", "storage", pod("/run"), ABOVE),
    ("the directory above by way of /var/run", "default", pod("/var/run"), ABOVE),
    ("the whole node", "default", pod("/"), ABOVE),
    ("the whole node with dots", "default", pod("/./"), ABOVE),
]  # fmt: skip
VOLUMES = [
    ("a volume of others", volume(hostPath={"path": "/data"}), None),
    ("a local volume of others", volume(local={"path": "/mnt/disk"}), None),
    ("a volume that is none of the node", volume(csi={"driver": "x"}), None),
    ("the sockets as a volume", volume(hostPath={"path": PUBLIC}), "may not be a persistent volume"),
    ("the sockets as a local volume", volume(local={"path": "/var/run/domaind"}), "may not be a persistent volume"),
    ("the directory above as a volume", volume(hostPath={"path": "/run"}), ABOVE),
]


def troubles(chart, values):
    docs = chart.documents(values)
    pod_policy, volume_policy = (Policy(doc) for doc in of_kind(docs, "ValidatingAdmissionPolicy"))
    rows = [(what, pod_policy.says(namespace, obj), words) for what, namespace, obj, words in PODS]
    rows += [(what, volume_policy.says("", obj), words) for what, obj, words in VOLUMES]
    # What the chart itself makes goes through.
    with_example = chart.documents(values | {"clientExample": {"enabled": True}})
    own = Policy(of_kind(with_example, "ValidatingAdmissionPolicy")[0])
    made = pods(with_example)
    if len(made) != 4:
        yield f"the chart makes {len(made)} kinds of pods, not 4"
    for name, meta, spec in made:
        rows.append((name, own.says(NAMESPACE, {"metadata": meta, "spec": spec}), None))
        if not name.startswith("DaemonSet"):
            writable = copy.deepcopy(spec)
            for mount in writable["containers"][0]["volumeMounts"]:
                mount["readOnly"] = False
            rows.append((f"{name}, writable", own.says(NAMESPACE, {"metadata": meta, "spec": writable}), READ_ONLY))
    # Empty lists are expressions, too.
    nobody = Policy(of_kind(chart.documents({"admissionPolicy": {"enabled": True}}), "ValidatingAdmissionPolicy")[0])
    rows.append(("a listed namespace where none is listed", nobody.says("storage", pod(PUBLIC)), LISTED))
    rows.append(("the whole node where denyParents is false", nobody.says("storage", pod("/")), None))
    for what, said, words in rows:
        if words is None and said:
            yield f"{what}: refused, {said}"
        if words is not None and not any(words in message for message in said):
            yield f"{what}: not refused with {words!r}, but {said or 'taken'}"


def rows():
    return len(PODS) + len(VOLUMES)


def match_troubles(docs):
    """The API server asks the policies about what can bring a mount in."""
    asked = set()
    for policy in of_kind(docs, "ValidatingAdmissionPolicy"):
        if policy["spec"]["failurePolicy"] != "Fail":
            yield f"{policy['metadata']['name']}: failurePolicy {policy['spec']['failurePolicy']}"
        for rule in policy["spec"]["matchConstraints"]["resourceRules"]:
            asked |= {(op, resource) for op in rule["operations"] for resource in rule["resources"]}
    wanted = {("CREATE", "pods"), ("UPDATE", "pods/ephemeralcontainers"),
              ("CREATE", "persistentvolumes"), ("UPDATE", "persistentvolumes")}  # fmt: skip
    if asked != wanted:
        yield f"asked about {sorted(asked)}, not {sorted(wanted)}"
    bound = {binding["spec"]["policyName"] for binding in of_kind(docs, "ValidatingAdmissionPolicyBinding")}
    named = {policy["metadata"]["name"] for policy in of_kind(docs, "ValidatingAdmissionPolicy")}
    if bound != named or len(named) != 2:
        yield f"policies {sorted(named)}, bindings of {sorted(bound)}"
    for binding in of_kind(docs, "ValidatingAdmissionPolicyBinding"):
        if binding["spec"]["validationActions"] != ["Deny"]:
            yield f"{binding['metadata']['name']} does {binding['spec']['validationActions']}"
