"""Configuration files: read them with their bases, apply ``a.b=c`` overrides, validate them, and write them back.

No key is named here. The models beside this file define them.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from personmae.errors import UserError
from personmae.keys import mistakes, renamed, yaml_text
from personmae.keys.values import escape_places, kind_at, parse, settle
from personmae.system.locations import expand

ConfigT = TypeVar("ConfigT", bound=BaseModel)
_COMMAND_LINE = "the command line"


@dataclass(slots=True)
class Tree:
    """Values from files and the command line before a program's keys give them types, and where each one comes from."""

    file: str
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)


def load(kind: type[ConfigT], path: str | Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Read ``path`` and its bases, apply ``section.key=value`` overrides, and validate.

    Raises:
        UserError: the file is missing or not YAML, a key is unknown or a value is wrong. The key, its origin and the
            nearest valid key are named.
    """
    tree = read(path)
    override(tree, kind, overrides)
    return validate(kind, tree)


def read(path: str | Path) -> Tree:
    """A file upon its bases. Raises a ``UserError`` for a file that cannot be read."""
    return _read(Path(path), seen=())


def override(tree: Tree, kind: type[BaseModel], overrides: Sequence[str]) -> None:
    """Set keys of a tree. The text after ``a.b=`` is read by the type of the key."""
    for text in overrides:
        key, equals, value = text.partition("=")
        keys = renamed.key_of_today(key).split(".")
        if not equals or not all(keys):
            raise UserError(f"an override must look like section.key=value. Got '{text}'")
        new = _nest(keys, parse(kind_at(kind, keys), value, key))
        renamed.rename(new, _COMMAND_LINE)
        _merge(tree, new, _COMMAND_LINE)


def validate(kind: type[ConfigT], tree: Tree, expand: Callable[[str], str] = expand) -> ConfigT:
    """The model of a tree. ``expand`` is applied to places.

    Raises:
        UserError: a key is unknown, missing or has a wrong value.
    """
    values = settle(kind, tree.values, lambda keys: mistakes.origin_of(keys, tree.origins, tree.file), expand)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError(mistakes.explain(kind, error, tree.origins, tree.file)) from None


def config_hash(config: BaseModel) -> str:
    """A short digest of the resolved configuration."""
    return hashlib.sha256(json.dumps(config.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()[:12]


def dump_yaml(config: BaseModel, *, expanded: bool = True) -> str:
    """The resolved configuration as ASCII YAML that ``load`` reads back. Not ``expanded``: with paths still to expand."""
    values = config.model_dump(mode="json")
    values = escape_places(type(config), values) if expanded else values
    return yaml.dump(values, Dumper=yaml_text.Dumper, sort_keys=False)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _read(path: Path, seen: tuple[Path, ...]) -> Tree:
    if path.resolve() in seen:
        raise UserError(f"_base_ must not lead back to the same file. {path} does")
    if not path.is_file():
        known = ", ".join(sorted(str(p) for p in path.parent.glob("*.yaml"))) or "none there"
        found = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"a configuration file is required. {path} {found} (yaml files beside it: {known})")
    own = yaml_text.read_tree(yaml_text.read_file(path), str(path))
    if not isinstance(own, dict):
        what = {list: "a list", type(None): "nothing"}.get(type(own), "one value")
        raise UserError(f"{path} must hold 'key: value' lines. It holds {what}")
    renamed.rename(own, str(path))
    base = own.pop("_base_", None)
    if base is not None and not isinstance(base, str):
        raise UserError(f"_base_ in {path} must name one file. It is {yaml_text.settle_untyped(base)!r}")
    tree = _read(path.parent / expand(base), (*seen, path.resolve())) if base else Tree("")
    tree.file = str(path)
    _merge(tree, own, str(path))
    return tree


def _nest(keys: list[str], value: Any) -> dict[str, Any]:
    return {keys[0]: _nest(keys[1:], value) if len(keys) > 1 else value}


def _merge(tree: Tree, new: dict[str, Any], origin: str) -> None:
    for into, key, value, path in _changes(tree.values, new, ""):
        into[key] = value
        tree.origins[path] = origin


def _changes(into: dict[str, Any], new: dict[str, Any], prefix: str) -> Iterator[tuple[dict[str, Any], str, Any, str]]:
    """Which dict gets which key, and its dotted path. Existing sections are entered."""
    for key, value in new.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            yield from _changes(into[key], value, f"{path}.")
        else:
            yield into, key, value, path
