"""What a directory of runs holds, known by its files.

``config.yaml``, ``run.json``, ``metrics.jsonl`` and checkpoints come from a program, ``result.json`` and ``rank_lists.json``
from an evaluation.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from personmae import config, metrics
from personmae.errors import UserError

RANDOM = "random"


class Result(BaseModel):
    """What ``finetune`` and ``evaluate`` measured; scores in [0, 1]."""

    name: str
    init: str
    benchmark: str
    root: str
    mAP: float  # noqa: N815 - the field's name for it
    rank1: float
    rank5: float
    rank10: float
    mINP: float  # noqa: N815
    num_queries: int
    num_valid: int
    num_gallery: int
    seconds: float
    commit: str | None = None


class RankList(BaseModel):
    """One query and its nearest gallery pictures; paths as they stand, or relative to ``RankLists.root``."""

    query: str
    gallery: list[str]
    correct: list[bool]


class RankLists(BaseModel):
    root: str
    entries: list[RankList]


@dataclass(frozen=True, slots=True)
class Run:
    """What one directory holds; an attribute is empty where its file is not there."""

    name: str
    directory: Path
    settings: config.Pretrain | config.Finetune | config.Unsupervised | None
    config_yaml: str
    info: dict[str, Any]
    records: list[dict[str, float]]
    result: Result | None
    rank_lists: RankLists | None

    @property
    def from_random(self) -> bool:
        """Whether it is a fine-tuning from random weights."""
        return isinstance(self.settings, config.Finetune) and self.settings.init == RANDOM


def find_runs(run_dir: Path) -> list[Run]:
    """The directory itself and those directly in it, as far as they hold something to report.

    Raises:
        UserError: there is no such directory, or nothing to report in it.
    """
    if not run_dir.is_dir():
        raise UserError(f"a directory with runs is required; {run_dir} is not a directory")
    folders = [run_dir, *sorted(entry for entry in run_dir.iterdir() if entry.is_dir())]
    runs = [read_run(folder) for folder in folders if any((folder / n).is_file() for n in ("run.json", "result.json"))]
    if not runs:
        raise UserError(
            f"a directory with runs (run.json) or results (result.json), or one of them, is required; {run_dir} holds "
            "neither: give the directory that 'personmae pretrain', 'finetune' or 'evaluate --out' wrote to"
        )
    # The order of rows: baselines, then random, then pre-trained.
    kinds = (config.Pretrain, type(None), config.Finetune, config.Unsupervised)
    return sorted(runs, key=lambda run: (kinds.index(type(run.settings)), not run.from_random, run.name))


def read_run(directory: Path) -> Run:
    """Everything a report needs of one directory."""
    path = directory / "config.yaml"
    try:
        info, records = json.loads(_text(directory / "run.json") or "{}"), metrics.read_records(directory)
    except ValueError as error:
        raise UserError(f"run.json and metrics.jsonl of {directory} must be JSON; {error}; repair or remove them") from error
    return Run(
        name=directory.resolve().name,
        directory=directory,
        settings=read_settings(path) if path.is_file() else None,
        config_yaml=_text(path),
        info=info,
        records=records,
        result=_parse(Result, directory / "result.json"),
        rank_lists=_parse(RankLists, directory / "rank_lists.json"),
    )


def read_settings(path: Path) -> config.Pretrain | config.Finetune | config.Unsupervised:
    """The configuration of a run; pre-training has no ``init``, and only unsupervised training has clusters."""
    fields = config.read(path).values
    kind = config.Unsupervised if "cluster" in fields else config.Finetune if "init" in fields else config.Pretrain
    return config.load(kind, path)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


ModelT = TypeVar("ModelT", bound=BaseModel)


def _parse(kind: type[ModelT], path: Path) -> ModelT | None:
    try:
        return kind.model_validate_json(path.read_bytes()) if path.is_file() else None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(
            f"{path} must be what 'personmae evaluate --out' writes; {where}: {first['msg']}; evaluate again"
        ) from error
