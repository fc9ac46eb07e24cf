"""Configuration files: read with their bases, overridden by ``a.b=c``, validated, and written back.

Nothing here knows a key: the models of ``config.py`` do.
"""

import difflib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from personmae.errors import UserError

ConfigT = TypeVar("ConfigT", bound=BaseModel)


def load(kind: type[ConfigT], path: str | Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Read ``path`` and its bases, apply ``section.key=value`` overrides, and validate.

    Raises:
        UserError: the file is missing or not YAML, a key is unknown or a value is wrong; the key, its origin and the
            nearest valid key are named.
    """
    values, origins = _read(Path(path), seen=())
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"an override must look like section.key=value; got '{override}'")
        _merge(values, _nest(key.split("."), _parse_yaml(text, f"the value of {key}")), origins, "the command line")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(kind, error, origins, str(path))) from None


def config_hash(config: BaseModel) -> str:
    """A short digest of the resolved configuration."""
    return hashlib.sha256(json.dumps(config.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()[:12]


def dump_yaml(config: BaseModel) -> str:
    """The resolved configuration as YAML that ``load`` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _read(path: Path, seen: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    if path.resolve() in seen:
        raise UserError(f"_base_ must not lead back to the same file; {path} does")
    if not path.is_file():
        known = ", ".join(sorted(str(p) for p in path.parent.glob("*.yaml"))) or "none there"
        found = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"a configuration file is required; {path} {found} (yaml files beside it: {known})")
    try:
        own = _parse_yaml(path.read_text(), str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} must be a text file in UTF-8: {error}") from None
    if not isinstance(own, dict):
        raise UserError(f"{path} must hold 'key: value' lines; it holds {type(own).__name__}")
    base = own.pop("_base_", None)
    if base is not None and not isinstance(base, str):
        raise UserError(f"_base_ in {path} must name one file; it is {base!r}")
    values, origins = _read(path.parent / base, (*seen, path.resolve())) if base else ({}, {})
    _merge(values, own, origins, str(path))
    return values, origins


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where} must be YAML: {error}") from None


def _nest(keys: list[str], value: Any) -> dict[str, Any]:
    return {keys[0]: _nest(keys[1:], value) if len(keys) > 1 else value}


def _merge(into: dict[str, Any], new: dict[str, Any], origins: dict[str, str], origin: str, prefix: str = "") -> None:
    for key, value in new.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value, origins, origin, f"{path}.")
        else:
            into[key] = value
            origins[path] = origin


def _explain(kind: type[BaseModel], error: ValidationError, origins: dict[str, str], file: str) -> str:
    first = error.errors()[0]
    keys = [str(part) for part in first["loc"]]
    path = ".".join(keys)
    origin = next((origins[".".join(keys[:n])] for n in range(len(keys), 0, -1) if ".".join(keys[:n]) in origins), file)
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path, _paths(kind), n=1, cutoff=0.0)
        return f"unknown key '{path}' in {origin}; the nearest known key is '{near[0]}'"
    if first["type"] == "missing" and isinstance(first["loc"][-1], int):
        return f"'{'.'.join(keys[:-1])}' in {origin} needs more values; got {first['input']!r}"
    if first["type"] == "missing":
        return f"'{path}' is required and {file} does not set it; add it to the file or give {path}=VALUE"
    return f"'{path}' in {origin}: {first['msg'].removeprefix('Value error, ')}; got {_shortened(first['input'])}"


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _paths(kind: type[BaseModel], prefix: str = "") -> list[str]:
    paths = []
    for name, field in kind.model_fields.items():
        paths.append(f"{prefix}{name}")
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            paths += _paths(field.annotation, f"{prefix}{name}.")
    return paths
