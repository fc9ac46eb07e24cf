"""YAML as people write it: nothing is lost silently, and a plain value keeps its text from the file.

YAML 1.1 reads ``20240101`` as a number, ``12:30`` as 750, ``010`` as 8, ``off`` as false and ``1e-3`` as a text. The right
reading depends on the key. So a plain scalar stays a ``Plain`` until the type of its key is known.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from personmae.errors import UserError

_FASTEST: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the parser written in C has ten times the pace of the other
_NULLS = {"", "~", "null", "Null", "NULL"}
_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_INT = re.compile(r"[-+]?(0|[1-9](_?[0-9])*|0x[0-9a-fA-F]+|0o[0-7]+|0b[01]+)")
_FLOAT = re.compile(r"[-+]?([0-9]+(_[0-9]+)*\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_SPECIAL = {".inf": float("inf"), "+.inf": float("inf"), "-.inf": float("-inf"), ".nan": float("nan")}
_LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+")
_TEXT = "tag:yaml.org,2002:str"


class Plain(str):
    """The text of a scalar without quotes, whose kind is not settled yet."""

    __slots__ = ()

    @property
    def is_null(self) -> bool:
        return self in _NULLS

    @property
    def has_leading_zero(self) -> bool:
        """Whether some readers take it for a number in base 8 and others in base 10."""
        return _LEADING_ZERO.fullmatch(self) is not None

    @property
    def value(self) -> bool | int | float | str | None:
        """Its value without a known key: None, a truth value, a number, or the text."""
        if self.is_null:
            return None
        if self.lower() in _BOOLS:
            return _BOOLS[self.lower()]
        if _INT.fullmatch(self):
            return int(self, 0)
        if self.lower() in _SPECIAL:
            return _SPECIAL[self.lower()]
        if not self.has_leading_zero and _FLOAT.fullmatch(self):
            return float(self)
        return str(self)


class _NoRepeats:
    """A loader that refuses a key that is twice in one mapping. YAML's own loaders keep the last one silently."""

    def construct_document(self, node: yaml.Node) -> Any:
        _refuse_repeats(node, ())
        return super().construct_document(node)  # type: ignore[misc]


class _Loader(_NoRepeats, _FASTEST):
    pass


class _PlainLoader(_NoRepeats, _FASTEST):
    pass


def _scalar(loader: Any, node: yaml.ScalarNode) -> str:
    text = loader.construct_scalar(node)
    return text if node.style in ("'", '"', "|", ">") else Plain(text)


for _kind in ("null", "bool", "int", "float", "timestamp", "str", "value"):
    _PlainLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _scalar)


class Dumper(yaml.SafeDumper):
    """Quotes every text that some reader takes for a number, a date, a truth value or nothing, such as ``1e3``."""


def represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    settled = isinstance(Plain(text).value, str) and not Plain(text).has_leading_zero
    return dumper.represent_scalar(_TEXT, str(text), style=None if settled else "'")


Dumper.add_representer(str, represent_text)
Dumper.add_representer(Plain, represent_text)


def read_file(path: Path) -> str:
    """The text of a file in UTF-8, whatever the locale, with or without a byte order mark.

    Raises:
        UserError: it is no text in UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} must be a text file in UTF-8. {error}: save it as UTF-8") from None


def read_tree(text: str, where: str) -> Any:
    """A document as dicts, lists, texts (in quotes) and ``Plain`` scalars. None for an empty one.

    Raises:
        UserError: it is not YAML, or a key is in it twice.
    """
    return _unshared(_read(text, where, _PlainLoader)[0])


def read_documents(text: str, where: str) -> list[Any]:
    """All documents with their values as YAML 1.1 has them, for what Kubernetes defines. Raises as ``read_tree``."""
    return _read(text, where, _Loader)


def settle_untyped(tree: Any) -> Any:
    """A tree with every ``Plain`` scalar read by YAML 1.1, for places without a known key."""
    if isinstance(tree, dict):
        return {str(key): settle_untyped(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [settle_untyped(value) for value in tree]
    return tree.value if isinstance(tree, Plain) else tree


def _unshared(tree: Any) -> Any:
    """A tree in which each alias has its own copy of the anchor's value, so that each can be changed alone."""
    if isinstance(tree, dict):
        return {key: _unshared(value) for key, value in tree.items()}
    return [_unshared(value) for value in tree] if isinstance(tree, list) else tree


def _read(text: str, where: str, loader: Any) -> list[Any]:
    try:
        if loader is _PlainLoader:
            return [yaml.load(text, loader)]
        return list(yaml.load_all(text, loader))
    except _Repeated as error:
        raise UserError(f"{where}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{where} must be YAML: {error}") from None


class _Repeated(Exception):  # noqa: N818 - it becomes a UserError with the file's name
    pass


def _refuse_repeats(node: yaml.Node, within: tuple[yaml.Node, ...]) -> None:
    """Raise for a key that is twice in one mapping at any depth, and for a node that contains itself."""
    if any(node is outer for outer in within):
        raise _Repeated(f"line {node.start_mark.line + 1}: a section must not contain itself")
    if isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _refuse_repeats(value, (*within, node))
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value in lines:
                raise _Repeated(f"'{key.value}' is given twice, in line {lines[key.value]} and line {line}. Keep one of them")
            if isinstance(key, yaml.ScalarNode):
                lines[key.value] = line
            _refuse_repeats(value, (*within, node))
