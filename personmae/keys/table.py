"""The keys of a program with their types, defaults and descriptions, as a table or a Markdown page made from the models."""

import types
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from personmae.keys.values import PLACE, kind_of
from personmae.keys.yaml_text import Dumper

_SIGNS = {"gt": "> {}", "ge": ">= {}", "lt": "< {}", "le": "<= {}", "multiple_of": "multiple of {}"}
_WIDEST = 40  # characters of a column
_NAMES = {bool: "true|false", int: "int", float: "number", str: "text", type(None): "null", Any: "anything"}


@dataclass(frozen=True, slots=True)
class Key:
    """One key, with texts for people."""

    name: str
    type: str
    default: str
    description: str


def keys_of(model: type[BaseModel], prefix: str = "") -> list[Key]:
    """All keys of a model but its sections, in order."""
    keys = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys += keys_of(kind, f"{prefix}{name}.")
        else:
            keys.append(Key(f"{prefix}{name}", _type_of(field), _default_of(field), field.description or ""))
    return keys


def to_table(keys: list[Key]) -> str:
    """Lines with aligned columns, but for types that are very long."""
    texts = [[len(getattr(key, part)) for key in keys] for part in ("name", "type", "default")]
    wide = [max((length for length in lengths if length <= _WIDEST), default=0) for lengths in texts]
    rows = (f"{k.name:{wide[0]}}  {k.type:{wide[1]}}  {k.default:{wide[2]}}  {k.description}".rstrip() for k in keys)
    return "".join(f"  {row}\n" for row in rows)


def _type_of(field: FieldInfo) -> str:
    return _named(kind_of(field), [item for item in field.metadata if item != PLACE])


def _named(kind: Any, limits: list[Any]) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return "path" if PLACE in parts[1:] else _named(parts[0], [*limits, *parts[1:]])
    if origin in (Union, types.UnionType):
        return " or ".join(_named(part, [] if part is type(None) else limits) for part in parts)
    if origin is Literal:
        return "|".join(map(str, parts))
    if origin is tuple:
        return "[" + ", ".join("..." if part is Ellipsis else _named(part, []) for part in parts) + "]"
    if origin is dict:
        return "section"
    return " ".join([_NAMES.get(kind, getattr(kind, "__name__", str(kind))), _limits(limits)]).rstrip()


def _limits(limits: list[Any]) -> str:
    """``> 0, < 1`` from what pydantic keeps of a field's bounds."""
    found = {name: getattr(item, name, None) for item in _flattened(limits) for name in _SIGNS if hasattr(item, name)}
    return ", ".join(_SIGNS[name].format(_short(value)) for name, value in found.items() if value is not None)


def _short(value: int | float) -> str:
    """``2^63`` for large powers of two."""
    if isinstance(value, int) and value >= 1 << 20 and not value & (value - 1):
        return f"2^{value.bit_length() - 1}"
    return str(value)


def _flattened(limits: list[Any]) -> list[Any]:
    return [part for item in limits for part in (item.metadata if isinstance(item, FieldInfo) else [item])]


def _default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    value = list(value) if isinstance(value, tuple) else value
    if isinstance(value, float):
        return f"{value:.4g}"
    text = yaml.dump(value, Dumper=Dumper, default_flow_style=True, width=1000)
    return text.removesuffix("\n...\n").strip()
