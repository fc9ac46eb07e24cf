"""Turn a tree of texts into the values that the fields of a model take, by their types. Pydantic then checks them.

A text field takes the text unchanged and a number field a number: ``20240101`` is a folder for ``run_dir`` and a number for
``seed``. In fields marked with ``PLACE``, ``~`` and ``$VAR`` are expanded.
"""

import re
import types
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypeGuard, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from personmae.errors import UserError
from personmae.keys import yaml_text
from personmae.keys.yaml_text import Plain
from personmae.system import locations

PLACE = "place"  # in a field's annotation: a path or a location
Place = Annotated[str, PLACE]
OriginOf = Callable[[Sequence[str]], str]


class _Reader(NamedTuple):
    """How values are read: ``origin_of`` names the origin of a key, and ``expand`` is applied to places."""

    origin_of: OriginOf
    expand: Callable[[str], str]


def kind_at(model: type[BaseModel], keys: Sequence[str]) -> Any:
    """The type of the field at a dotted key. None where it is unknown or may be anything."""
    field = model.model_fields.get(keys[0])
    if field is None:
        return None
    kind = kind_of(field)
    if len(keys) == 1:
        return None if kind is Any else kind
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind_at(kind, keys[1:])
    return str if get_origin(kind) is dict and get_args(kind)[1] is str and len(keys) == 2 else None


def parse(kind: Any, text: str, key: str) -> Any:
    """The value after ``key=`` on a command line: an unchanged text, a list or section as YAML, or one plain scalar.

    Raises:
        UserError: the value must be YAML and is not.
    """
    if _is_text(kind):
        return None if text == "null" and type(None) in _members(kind) else text
    if text.lstrip().startswith(("[", "{")) or (kind is None and text.lstrip().startswith(("'", '"'))):
        return yaml_text.read_tree(text, f"the value of {key}")
    return Plain(text.strip())


def settle(
    model: type[BaseModel],
    values: dict[str, Any],
    origin_of: OriginOf,
    expand: Callable[[str], str] = locations.expand,
) -> dict[str, Any]:
    """The values of a model's fields, each by its type. Unknown keys stay, and pydantic refuses them.

    Args:
        origin_of: the origin of a key, for messages.
        expand: applied to places.

    Raises:
        UserError: a number begins with 0, or a variable in a path is not set.
    """
    return _settle(model, values, (), _Reader(origin_of, expand))


def escape_places(model: type[BaseModel], values: dict[str, Any]) -> dict[str, Any]:
    """Double ``$`` in fields that are places, so that they mean the same when they are read again."""
    found = dict(values)
    for name, field in model.model_fields.items():
        kind, value = kind_of(field), values.get(name)
        if isinstance(value, dict) and is_model(kind):
            found[name] = escape_places(kind, value)
        elif isinstance(value, str) and _is_place(kind):
            found[name] = locations.escape(value)
    return found


def _settle(kind: Any, value: Any, keys: tuple[str, ...], reader: _Reader) -> Any:
    if isinstance(value, dict):
        return _settled_section(kind, value, keys, reader)
    items = items_of(kind)
    if items and isinstance(value, str):
        value = _split(value, items)
    if isinstance(value, list):
        return [
            _settle(items[min(n, len(items) - 1)] if items else Any, item, (*keys, str(n)), reader)
            for n, item in enumerate(value)
        ]
    try:
        return _settled_scalar(kind, value, reader)
    except UserError as error:
        raise UserError(f"'{'.'.join(keys)}' in {reader.origin_of(keys)}: {error}") from None


def _settled_section(kind: Any, values: dict[str, Any], keys: tuple[str, ...], reader: _Reader) -> dict[str, Any]:
    if is_model(kind):
        kinds = {name: kind_of(field) for name, field in kind.model_fields.items()}
        return {str(key): _settle(kinds.get(key, Any), value, (*keys, str(key)), reader) for key, value in values.items()}
    of_all = get_args(kind)[1] if get_origin(kind) is dict else Any
    return {str(key): _settle(of_all, value, (*keys, str(key)), reader) for key, value in values.items()}


def _settled_scalar(kind: Any, value: Any, reader: _Reader) -> Any:
    if not isinstance(value, str):
        return value
    if kind is Any:
        return yaml_text.settle_untyped(value)
    members = _members(kind)
    home = value == "~" and _is_place(kind) and type(None) not in members
    if isinstance(value, Plain) and value.is_null and (type(None) in members or _is_text(kind)) and not home:
        return None
    if _is_place(kind):
        return reader.expand(str(value))
    if choice := [choice for member in members for choice in _choices(member) if str(choice) == value]:
        return choice[0]
    return str(value) if _is_text(kind) or not isinstance(value, Plain) else _number(members, value)


def _number(members: tuple[Any, ...], plain: Plain) -> Any:
    """The number or truth value of a plain scalar. Its text where it is neither, which pydantic then refuses."""
    if plain.has_leading_zero:
        raise UserError(f"a number that begins with 0 is octal to some and decimal to others. Got {plain}: leave the 0 out")
    value = plain.value
    fits = isinstance(value, bool) == (bool in members) if isinstance(value, bool | int | float) else value is None
    return value if fits or (bool in members and isinstance(value, int)) else str(plain)


def _split(text: str, items: tuple[Any, ...]) -> Any:
    """``128x64`` and ``0.9, 0.95`` as lists where the field takes numbers. Otherwise the text."""
    if Plain(text).is_null or any(_is_text(item) for item in items):
        return text
    pattern = r"\s*[x×]\s*|\s*,\s*" if int in {_members(item)[0] for item in items} else r"\s*,\s*"
    return [Plain(part) for part in re.split(pattern, text.strip())]


def kind_of(field: FieldInfo) -> Any:
    """A field's type. Pydantic stores the outer arguments of ``Annotated`` elsewhere."""
    return Annotated[field.annotation, PLACE] if PLACE in field.metadata else field.annotation


def _members(kind: Any) -> tuple[Any, ...]:
    """The types of a union without their annotations, or the one type."""
    if get_origin(kind) is Annotated:
        return _members(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return tuple(member for part in get_args(kind) for member in _members(part))
    return (kind,)


def items_of(kind: Any) -> tuple[Any, ...]:
    """The types of a tuple's items. Empty for other types."""
    for member in _members(kind):
        if get_origin(member) in (tuple, list):
            return tuple(item for item in get_args(member) if item is not Ellipsis)
    return ()


def _choices(member: Any) -> tuple[Any, ...]:
    return get_args(member) if get_origin(member) is Literal else ()


def _is_text(kind: Any) -> bool:
    """Whether a field takes any text, or one of some texts, and nothing else but null."""
    members = [member for member in _members(kind) if member is not type(None)]
    return all(member is str or any(isinstance(choice, str) for choice in _choices(member)) for member in members)


def _is_place(kind: Any) -> bool:
    if get_origin(kind) is Annotated:
        return PLACE in get_args(kind)[1:] or _is_place(get_args(kind)[0])
    return get_origin(kind) in (Union, types.UnionType) and any(_is_place(part) for part in get_args(kind))


def is_model(kind: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
