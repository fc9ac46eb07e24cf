"""Typed configuration: YAML files with ``_base_``, then ``section.key=value`` overrides, read into frozen models.

A default is overridden by ``_base_``, that by the file, and that by the command line. Only programs read these models.
Everything below the programs takes plain arguments. All sizes are global: values per rank follow from the world size.

This is what programs call. The keys are in ``keys/``: ``pretraining.py``, ``downstream.py``, and ``sections.py`` for what all
share. ``keys/config_file.py`` reads and writes the files.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from personmae.errors import OtherProgram, UserError
from personmae.keys.config_file import Tree, config_hash, dump_yaml, flatten, override, read, validate
from personmae.keys.downstream import (
    RANDOM,
    BenchmarkName,
    Cluster,
    Finetune,
    Memory,
    Unsupervised,
    completed_resume_key,
    with_normalisation,
)
from personmae.keys.mistakes import unknown_keys
from personmae.keys.pretraining import Pretrain
from personmae.keys.sections import (
    Checkpoint,
    Fraction,
    Metrics,
    Model,
    Range,
    Section,
    Size,
    Triple,
)
from personmae.keys.values import Place
from personmae.system import locations

__all__ = [
    "PROGRAMS",
    "RANDOM",
    "BenchmarkName",
    "Checkpoint",
    "Cluster",
    "Finetune",
    "Fraction",
    "Memory",
    "Metrics",
    "Model",
    "OtherProgram",
    "Place",
    "Pretrain",
    "Range",
    "Section",
    "Size",
    "Triple",
    "Unsupervised",
    "completed_resume_key",
    "config_hash",
    "dump_yaml",
    "flatten",
    "load",
    "program_of",
    "with_normalisation",
]


PROGRAMS: dict[str, type[Section]] = {"pretrain": Pretrain, "finetune": Finetune, "unsupervised": Unsupervised}
ConfigT = TypeVar("ConfigT", bound=Section)


def load(
    kind: type[ConfigT], path: str | Path, overrides: Sequence[str] = (), expand: Callable[[str], str] = locations.expand
) -> ConfigT:
    """Read ``path`` and its bases, apply ``section.key=value`` overrides, and validate. ``expand`` is applied to places.

    Raises:
        OtherProgram: the file is for another program.
        UserError: the file is missing or not YAML, a key is unknown, or a value is wrong. The message names the key, its
            origin and the nearest valid key.
    """
    tree = read(path)
    try:
        override(tree, kind, overrides)
        return validate(kind, tree, expand)
    except UserError:
        program = _program_of(read(path), kind)
        if program and not (program == "suite" and "stages" in kind.model_fields):
            raise OtherProgram(str(path), program) from None
        raise


def program_of(path: str | Path) -> str:
    """The program that a file is for, by its keys, or ``suite``. Empty where several programs fit.

    Raises:
        UserError: the file cannot be read.
    """
    return _program_of(read(path), None)


def _program_of(tree: Tree, wanted: type[Section] | None) -> str:
    """The program that knows the most keys of a tree. Where several know as many: the wanted one, or none."""
    if "stages" in tree.values:
        return "suite"
    unknown = {name: len(unknown_keys(kind, tree.values)) for name, kind in PROGRAMS.items()}
    fewest = min(unknown.values())
    best = [name for name, number in unknown.items() if number == fewest]
    if wanted is None:
        return best[0] if len(best) == 1 else ""
    return best[0] if fewest < len(unknown_keys(wanted, tree.values)) else ""
