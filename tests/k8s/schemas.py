"""Strict schemas: core kinds by kubernetes-validate, custom kinds by the definitions that their projects publish."""

import functools
import importlib.resources
import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from referencing import Registry, Resource

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = ("1.34", "1.35", "1.36", "1.37")
_CUSTOM = ("jobset.x-k8s.io", "kueue.x-k8s.io", "trainer.kubeflow.org", "monitoring.coreos.com")


def is_custom(item: dict[str, Any]) -> bool:
    return item["apiVersion"].split("/")[0] in _CUSTOM


def check_core(item: dict[str, Any], version: str) -> None:
    """A kind of Kubernetes itself, strictly: no field that this version does not know."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="needs the dev extra's kubernetes-validate")
    assert kubernetes_validate.validate(item, version, strict=True) == version  # it takes an older one where it knows no other


def check_core_quickly(item: dict[str, Any], version: str) -> None:
    """``check_core`` for many objects: the package's own schemas, each read once."""
    _core(item["kind"], item["apiVersion"], version).validate(item)


@functools.cache
def _core(kind: str, api_version: str, version: str) -> jsonschema.Draft202012Validator:
    pytest.importorskip("kubernetes_validate", reason="needs the dev extra's kubernetes-validate")
    folder = importlib.resources.files("kubernetes_validate") / "kubernetes-json-schema" / f"v{version}.0-local-strict"
    group, _, short = api_version.rpartition("/")
    name = "-".join(filter(None, (kind.lower(), group.split(".")[0], short))) + ".json"
    schema, definitions = (json.loads((folder / each).read_text()) for each in (name, "_definitions.json"))
    registry = Resource.from_contents(definitions) @ Registry()
    return jsonschema.Draft202012Validator(schema, registry=registry)


def check_custom(item: dict[str, Any]) -> None:
    """A custom kind, strictly."""
    group, _, version = item["apiVersion"].partition("/")
    schema = _schema(group, version, item["kind"])
    assert schema, f"{_folder()} has no definition of {item['apiVersion']} {item['kind']}"
    jsonschema.Draft202012Validator(schema).validate(item)  # the schemas are large: they are not checked themselves


def have_custom() -> bool:
    """Whether the definitions are there: in PERSONMAE_CRDS, or in shared/crds beside the checkout."""
    return _folder().is_dir()


def _folder() -> Path:
    return Path(os.environ.get("PERSONMAE_CRDS") or ROOT.parent / "shared" / "crds")


@functools.cache
def _schema(group: str, version: str, kind: str) -> dict[str, Any] | None:
    for path in _folder().glob("*.yaml"):
        text = path.read_text()
        if f"\n    kind: {kind}\n" not in text:  # they are large, and reading YAML is slow
            continue
        for definition in yaml.load_all(text, yaml.CSafeLoader):
            spec = definition["spec"]
            if (spec["group"], spec["names"]["kind"]) != (group, kind):
                continue
            for each in spec["versions"]:
                if each["name"] == version:
                    schema = each["schema"]["openAPIV3Schema"]
                    schema["properties"]["metadata"] = {"type": "object"}
                    return _closed(schema)
    return None


def _closed(schema: Any) -> Any:
    """The schema with unknown fields forbidden, and Kubernetes' own extensions in the words of JSON schema."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    fields = schema.get("properties", {})
    closed = {key: _closed(value) for key, value in schema.items() if key != "properties"}
    if fields:
        closed["properties"] = {name: _closed(value) for name, value in fields.items()}
        if "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            closed["additionalProperties"] = False
    return closed
