"""The part of kustomize that k8s/ uses, so that rendering needs neither a cluster nor kubectl.

Bases, components, JSON patches, generated config maps, name prefix, namespace, labels, images. Anything else in a
kustomization is refused rather than left out; ``tests/k8s`` holds the result equal to ``kubectl kustomize``.
"""

import copy
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from personmae.errors import UserError
from personmae.keys.yaml_text import read_documents, read_file

Object = dict[str, Any]
FILE = "kustomization.yaml"
_FIELDS = {
    "apiVersion",
    "kind",
    "resources",
    "components",
    "generatorOptions",
    "configMapGenerator",
    "patches",
    "namespace",
    "namePrefix",
    "labels",
    "images",
    "configurations",  # for kustomize, what is known here: where a JobSet and a TrainingRuntime name others
}
_CLUSTER_WIDE = {
    "Namespace",
    "PriorityClass",
    "ClusterRole",
    "ClusterQueue",
    "ResourceFlavor",
    "Topology",
    "WorkloadPriorityClass",
}
_UNPREFIXED = {"Namespace", "CustomResourceDefinition"}
_POD = {
    "Job": "spec/template/spec",
    "Deployment": "spec/template/spec",
    "JobSet": "spec/replicatedJobs[]/template/spec/template/spec",
    "TrainingRuntime": "spec/template/spec/replicatedJobs[]/template/spec/template/spec",
}
# Where objects name others: the kind named, and the path below the pod (volumes and env lists are gone through) or the object.
_POD_NAMES = [
    ("ServiceAccount", "serviceAccountName"),
    ("ConfigMap", "volumes[]/configMap/name"),
    ("ConfigMap", "containers[]/envFrom[]/configMapRef/name"),
    ("ConfigMap", "initContainers[]/envFrom[]/configMapRef/name"),
]
_SELECTORS = [  # kind, path, whether it is created
    ("Service", "spec/selector", True),
    ("Deployment", "spec/selector/matchLabels", True),
    ("Deployment", "spec/template/metadata/labels", True),
    ("Job", "spec/template/metadata/labels", True),
    ("PodDisruptionBudget", "spec/selector/matchLabels", False),
    ("NetworkPolicy", "spec/podSelector/matchLabels", False),
    ("NetworkPolicy", "spec/ingress[]/from[]/podSelector/matchLabels", False),
    ("NetworkPolicy", "spec/egress[]/to[]/podSelector/matchLabels", False),
]


def build(directory: Path, spec: Object | None = None) -> list[Object]:
    """The objects of a kustomization; ``spec`` stands for the file of ``directory``, which is read by default.

    Raises:
        UserError: a file is missing, a field is beyond this part of kustomize, or a patch does not apply.
    """
    return _accumulate(directory, read(directory) if spec is None else spec, [])


def read(directory: Path) -> Object:
    """The kustomization file of a directory."""
    path = directory / FILE
    if not path.is_file():
        raise UserError(f"a folder with a {FILE} is required; {directory} has none")
    return _documents(read_file(path), str(path))[0]


def _documents(text: str, where: str) -> list[Any]:
    """The YAML documents of a text, the caller's own."""
    return copy.deepcopy(_parsed(text, where))


@functools.lru_cache(maxsize=512)
def _parsed(text: str, where: str) -> list[Any]:
    """Parsing takes nearly all the time of a rendering."""
    return read_documents(text, where)


def _accumulate(directory: Path, spec: Object, objects: list[Object]) -> list[Object]:
    if unknown := sorted(spec.keys() - _FIELDS):
        raise UserError(f"{directory / FILE} may have {', '.join(sorted(_FIELDS))}; '{unknown[0]}' is not understood here")
    for resource in spec.get("resources", []):
        path = directory / resource
        objects = objects + (build(path) if path.is_dir() else _load(path))
    for component in spec.get("components", []):
        objects = _accumulate(directory / component, read(directory / component), objects)
    for wanted in spec.get("configMapGenerator", []):
        _generate(directory, wanted, spec.get("generatorOptions", {}), objects)
    for patch in spec.get("patches", []):
        where = directory / patch.get("path", FILE)
        (operations,) = _documents(patch["patch"] if "patch" in patch else read_file(where), str(where))
        for item in objects:
            if _is_target(item, patch["target"]):
                apply_patch(item, operations)
    if "namespace" in spec:
        _set_namespace(objects, spec["namespace"])
    if "namePrefix" in spec:
        _prefix(objects, spec["namePrefix"])
    for labels in spec.get("labels", []):
        _label(objects, labels)
    for image in spec.get("images", []):
        _set_image(objects, image)
    return objects


def _load(path: Path) -> list[Object]:
    if not path.is_file():
        raise UserError(f"{path} is named by a kustomization and does not exist")
    return [item for item in _documents(read_file(path), str(path)) if item]


def _is_target(item: Object, target: dict[str, str]) -> bool:
    if unknown := target.keys() - {"kind", "name", "labelSelector"}:
        raise UserError(f"a patch's target may have kind, name and labelSelector, got {sorted(unknown)[0]}")
    labels = item["metadata"].get("labels", {})
    key, _, value = target.get("labelSelector", "").partition("=")
    named = target.get("name", item["metadata"]["name"]) == item["metadata"]["name"]
    return target.get("kind", item["kind"]) == item["kind"] and named and (not key or labels.get(key) == value)


def apply_patch(item: Object, operations: list[Object]) -> None:
    """Apply the operations of a JSON patch (RFC 6902: add, replace, remove, test) in place."""
    for each in operations:
        *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in each["path"].lstrip("/").split("/")]
        try:
            _operate(_descend(item, parents), last, each)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            where = f"{item['kind']} {item['metadata']['name']}"
            raise UserError(f"the patch '{each['op']} {each['path']}' must fit {where}, and it does not: {error!r}") from None


def _descend(node: Any, parts: list[str]) -> Any:
    for part in parts:
        node = node[int(part)] if isinstance(node, list) else node[part]
    return node


def _operate(parent: Any, key: str, each: Object) -> None:
    at: Any = (len(parent) if key == "-" else int(key)) if isinstance(parent, list) else key
    match each["op"]:
        case "add" if isinstance(parent, list):
            parent.insert(at, copy.deepcopy(each["value"]))
        case "add":
            parent[at] = copy.deepcopy(each["value"])
        case "replace":
            _ = parent[at]  # it has to be there
            parent[at] = copy.deepcopy(each["value"])
        case "remove":
            del parent[at]
        case "test":
            if parent[at] != each["value"]:
                raise ValueError(f"{parent[at]!r} is not {each['value']!r}")
        case other:
            raise ValueError(f"{other} is not one of add, replace, remove, test")


def _generate(directory: Path, wanted: Object, options: Object, objects: list[Object]) -> None:
    pairs = (literal.split("=", 1) for literal in wanted.get("literals", []))
    data = {key: re.sub(r"(?s)^(['\"])(.*)\1$", r"\2", value) for key, value in pairs}  # as kustomize does
    for file in wanted.get("files", []):
        data[Path(file).name] = read_file(directory / file)
    labels = wanted.get("options", {}).get("labels")
    if not options.get("disableNameSuffixHash") and wanted.get("behavior") != "merge":
        raise UserError(f"{directory / FILE} must set generatorOptions.disableNameSuffixHash: names here have no digest")
    if wanted.get("behavior") == "merge":
        known = [o for o in objects if o["kind"] == "ConfigMap" and o["metadata"]["name"] == wanted["name"]]
        if not known:
            raise UserError(f"{directory / FILE} merges into the config map '{wanted['name']}', which does not exist")
        known[0]["data"].update(data)
        return
    metadata = {"name": wanted["name"]} | ({"labels": dict(labels)} if labels else {})
    objects.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})


def _set_namespace(objects: list[Object], namespace: str) -> None:
    for item in objects:
        if item["kind"] not in _CLUSTER_WIDE:
            item["metadata"]["namespace"] = namespace
        for subject in item.get("subjects", []):
            if subject["kind"] == "ServiceAccount":
                subject["namespace"] = namespace


def _prefix(objects: list[Object], prefix: str) -> None:
    own = {(item["kind"], item["metadata"]["name"]) for item in objects}
    for item in objects:
        if item["kind"] not in _UNPREFIXED:
            item["metadata"]["name"] = prefix + item["metadata"]["name"]
        for kind, path in _references(item):
            _update(item, path, lambda name, kind=kind: prefix + name if (kind, name) in own else name)


def _references(item: Object) -> Iterator[tuple[str, str]]:
    if pod := _POD.get(item["kind"]):
        yield from ((kind, f"{pod}/{path}") for kind, path in _POD_NAMES)
    if item["kind"] == "RoleBinding":
        yield (item["roleRef"]["kind"], "roleRef/name")
        yield ("ServiceAccount", "subjects[]/name")
    if item["kind"] == "Role":
        yield ("ConfigMap", "rules[]/resourceNames[]")
    if item["kind"] == "TrainJob":
        yield ("TrainingRuntime", "spec/runtimeRef/name")


def _update(node: Any, path: str, change: Callable[[Any], Any], *, create: bool = False) -> None:
    """Put ``change(value)`` at a path like ``a/b[]/c``, or ``a/b[]`` for every item of a list.

    A missing place is passed over, or begun as an empty mapping.
    """
    head, _, rest = path.partition("/")
    key = head.removesuffix("[]")
    if key not in node:
        if not create:
            return
        node[key] = {}
    if not rest:
        node[key] = [change(each) for each in node[key]] if head.endswith("[]") else change(node[key])
        return
    for child in node[key] if head.endswith("[]") else [node[key]]:
        _update(child, rest, change, create=create)


def _label(objects: list[Object], labels: Object) -> None:
    pairs = labels["pairs"]
    more = [(f["kind"], f["path"], f.get("create", False)) for f in labels.get("fields", [])]
    for item in objects:
        _update(item, "metadata/labels", lambda old: old | pairs, create=True)
        for kind, path, create in (_SELECTORS if labels.get("includeSelectors") else []) + more:
            if kind == item["kind"]:
                _update(item, path, lambda old: old | pairs, create=create)


def _set_image(objects: list[Object], image: dict[str, str]) -> None:
    name = image.get("newName", image["name"])
    tag, digest = image.get("newTag"), image.get("digest")
    full = name + (f":{tag}" if tag else "") + (f"@{digest}" if digest else "")
    for item in objects:
        for path in ("containers[]/image", "initContainers[]/image") if item["kind"] in _POD else ():
            _update(item, f"{_POD[item['kind']]}/{path}", lambda old: full if old == image["name"] else old)
