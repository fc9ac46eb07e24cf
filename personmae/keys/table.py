"""The keys of a program with their types, defaults and descriptions, as a table or a Markdown page made from the models."""

import inspect
import textwrap
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from personmae.keys.renamed import RENAMED
from personmae.keys.values import PLACE, is_model, kind_of
from personmae.keys.yaml_text import Dumper

_SIGNS = {"gt": "> {}", "ge": ">= {}", "lt": "< {}", "le": "<= {}", "multiple_of": "multiple of {}"}
_WIDEST = 40  # characters of a column
_PAGE = 100  # characters of a line of the page
_NAMES = {bool: "true|false", int: "int", float: "number", str: "text", type(None): "null", Any: "anything"}


@dataclass(frozen=True, slots=True)
class Key:
    """One key, as texts."""

    name: str
    type: str
    default: str
    description: str


@dataclass(frozen=True, slots=True)
class KeySection:
    """A section with the keys that are directly in it. The name is empty for the program itself."""

    name: str
    description: str
    keys: list[Key]


def sections_of(model: type[BaseModel], name: str = "") -> list[KeySection]:
    """A model and all its sections, each before those within it."""
    prefix = f"{name}." if name else ""
    keys, within = [], []
    for key, field in model.model_fields.items():
        if is_model(field.annotation):
            within += sections_of(field.annotation, f"{prefix}{key}")
        else:
            keys.append(Key(f"{prefix}{key}", _type_of(field), _default_of(field), field.description or ""))
    return [KeySection(name, inspect.cleandoc(vars(model).get("__doc__") or ""), keys), *within]


def keys_of(model: type[BaseModel]) -> list[Key]:
    """All keys of a model, without the sections themselves, section by section."""
    return [key for section in sections_of(model) for key in section.keys]


def to_markdown(programs: Mapping[str, type[BaseModel]], head: str) -> str:
    """A page with the keys of all programs. Sections that all of them share come first, and once."""
    found = {name: sections_of(model) for name, model in programs.items()}
    first, *others = found.values()
    shared = [section for section in first if section.name and all(section in sections for sections in others)]
    parts = [head, "## All programs", *map(_section_to_markdown, shared)]
    for name, sections in found.items():
        parts += [f"## {name}", *(_section_to_markdown(section) for section in sections if section not in shared)]
    old_names = [_item(f"`{old}` is called `{new}` now") for old, new in RENAMED.items()]
    parts += ["## Old names", "These work for one more release and print the new name.", "\n".join(old_names)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _section_to_markdown(section: KeySection) -> str:
    heading = [f"### {section.name}"] if section.name else []
    description = "\n".join(textwrap.wrap(section.description, _PAGE, break_on_hyphens=False))
    return "\n\n".join(filter(None, [*heading, description, "\n".join(map(_key_to_markdown, section.keys))]))


def _key_to_markdown(key: Key) -> str:
    default = key.default if key.default == "required" else f"default `{key.default}`"
    kind = key.type.replace("|", " | ")  # so that long ones can be wrapped
    return _item(f"`{key.name}` (`{kind}`, {default}): {key.description}.")


def _item(text: str) -> str:
    """An item of a list, in lines of the page's width."""
    wrapped = textwrap.wrap(text, _PAGE - 2, break_on_hyphens=False, break_long_words=False)
    return "- " + "\n  ".join(wrapped)


def to_table(keys: list[Key]) -> str:
    """Lines with aligned columns. Types that are very long are not aligned."""
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
