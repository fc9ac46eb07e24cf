"""Paths and locations as people write them: ``~`` is a home, ``$VAR`` or ``${VAR}`` a variable, ``$$`` a dollar.

In a location with ``://`` this holds up to the next slash alone. What follows is a key, and may have any characters.
"""

import os
import re

from personmae.errors import UserError

_STORE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_VARIABLE = re.compile(
    r"\$(?:(?P<dollar>\$)|(?P<bare>[A-Za-z_][A-Za-z0-9_]*)|\{(?P<braced>[A-Za-z_][A-Za-z0-9_]*)\}|(?P<bad>\{))"
)


def is_remote(text: str) -> bool:
    """Whether a text names an object store rather than a directory."""
    return _STORE.match(text) is not None


def expand(text: str) -> str:
    """The text with the home directory and the environment's variables in it. Other characters stay, a lone ``$`` too.

    Raises:
        UserError: a variable is not set or empty, or there is no such home.
    """
    if store := _STORE.match(text):
        slash = text.find("/", store.end())
        end = len(text) if slash < 0 else slash
        return _VARIABLE.sub(lambda found: _value(text, found), text[:end]) + text[end:]
    return _VARIABLE.sub(lambda found: _value(text, found), _at_home(text))


def expand_location(text: str) -> str:
    """As ``expand`` where it is a location in a store, which is one on every host. A path is another host's, and stays."""
    return expand(text) if is_remote(text) else text


def escape(text: str) -> str:
    """What ``expand`` turns into the text again. A text that begins with ``~`` cannot come out of ``expand``."""
    if is_remote(text):
        bucket = re.match(r"[^/]*//[^/]*", text)
        end = bucket.end() if bucket else 0
        return text[:end].replace("$", "$$") + text[end:]
    return text.replace("$", "$$")


def location(text: str) -> str:
    """A path or an object store of a command line. What is there as it stands is taken so: shells hand on any name.

    Raises:
        UserError: as ``expand``.
    """
    return text if text and os.path.lexists(text) else expand(text)


def _at_home(text: str) -> str:
    if not text.startswith("~"):
        return text
    full = os.path.expanduser(text)
    if full.startswith("~"):
        user = text.partition("/")[0]
        raise UserError(
            f"{user} must be a home directory and there is none. Got {text}: write ./{text} for a folder of that name"
        )
    return full


def _value(text: str, found: re.Match[str]) -> str:
    if found["dollar"]:
        return "$"
    if found["bad"]:
        raise UserError(f"a variable is written $NAME or ${{NAME}}, and $$ is a dollar. Got {text}")
    name = found["bare"] or found["braced"]
    value = os.environ.get(name, "")
    if not value:
        raise UserError(f"the environment's variable {name} is not set or empty. Got {text}: set it, or write $$ for a dollar")
    return value
