"""The runs in a directory, read from their files.

Programs write ``config.yaml``, ``run.json``, ``metrics.jsonl`` and checkpoints. Evaluations write ``result.json``,
``rank_lists.json`` and ``queries.json``.
"""

import contextlib
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from personmae import config
from personmae.checkpoint import portable
from personmae.config import RANDOM
from personmae.errors import UserError
from personmae.monitor import run_log
from personmae.report import renewed
from personmae.report.places import Lost, Place
from personmae.report.records import Queries, RankLists, Result
from personmae.system import files

Settings = config.Pretrain | config.Finetune | config.Unsupervised


@dataclass(frozen=True, slots=True)
class RunProgress:
    """How far a training is. ``total`` is None where it is unknown."""

    step: int
    total: int | None
    finished: bool

    def __str__(self) -> str:
        """In words, such as "step 30 of 60"."""
        return f"step {self.step:,} of {self.total:,}" if self.total else f"step {self.step:,}, of how many is unknown"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """What one directory holds. An attribute is empty where its file is not there."""

    name: str
    directory: Path
    settings: Settings | None
    config_yaml: str
    info: dict[str, Any]
    records: list[dict[str, float]]
    result: Result | None
    rank_lists: RankLists | None
    queries: Queries | None
    progress: RunProgress | None
    clusters: Sequence[dict[str, float]] = ()  # what unsupervised training knows of each of its clusterings
    evaluated: "RunFolder | None" = None  # the run that an evaluation is of, where it was trained here

    @property
    def from_random(self) -> bool:
        """Whether it is a fine-tuning from random weights."""
        return isinstance(self.settings, config.Finetune) and self.settings.init == RANDOM

    @property
    def unfinished(self) -> str:
        """How far it is, in words. Empty at its end."""
        if self.progress:
            return "" if self.progress.finished else str(self.progress)
        return (self.result.unfinished or "") if self.result else ""

    @property
    def trained(self) -> "RunFolder":
        """The run whose model was measured: itself, or the one that it is an evaluation of."""
        return self.evaluated or self

    @property
    def seed(self) -> int | None:
        """That of the training, or of random weights. None where there is neither."""
        settings = self.trained.settings
        return settings.seed if settings else (self.result.random.get("seed") if self.result else None)

    @property
    def place(self) -> Place:
        """What leads from recorded paths to where they are now."""
        run_dir = self.settings.run_dir if self.settings else ""
        return Place(self.directory, run_dir, str((self.sessions or [{}])[-1].get("cwd") or self.info.get("cwd") or ""))

    @property
    def sessions(self) -> list[dict[str, Any]]:
        """Each start of the run, the newest last."""
        return self.info.get("sessions") or []

    @property
    def kind(self) -> str:
        """What was done, in a word."""
        kinds = {config.Pretrain: "pre-training", config.Finetune: "fine-tuning", config.Unsupervised: "without labels"}
        return kinds.get(type(self.settings), "evaluation")  # pyright: ignore[reportArgumentType] - None has no kind

    @property
    def train_seconds(self) -> float | None:
        """How long its steps took, by their rates: what was stopped for in between does not count."""
        batch = images_per_step(self.settings)
        rates = [(r["step"], r.get("images_per_second", math.nan)) for r in self.records]
        steps = itertools.pairwise([0.0, *(step for step, _ in rates)])
        parts = [(b - a) * batch / rate for (a, b), (_, rate) in zip(steps, rates, strict=True) if rate > 0]
        return math.fsum(parts) if parts else None

    @property
    def seconds(self) -> float | None:
        """All of its sessions where they are recorded, else training and evaluation."""
        known = [session.get("seconds") for session in self.sessions]
        if known and None not in known:
            return math.fsum(s for s in known if s is not None)
        parts = [s for s in (self.train_seconds, self.result.seconds if self.result else None) if s is not None]
        return math.fsum(parts) if parts else None


def pretraining_of(run: RunFolder) -> config.Pretrain:
    """The settings of a pre-training run, with the data where it is now.

    Raises:
        Lost: its shards are neither where they were nor where the record suggests.
    """
    settings = run.settings
    assert isinstance(settings, config.Pretrain)
    data = settings.data.model_copy(update={"shards": run.place.find(settings.data.shards), "cache_dir": _cache_dir(run)})
    return settings.model_copy(update={"data": data})


def _cache_dir(run: RunFolder) -> str | None:
    assert isinstance(run.settings, config.Pretrain)
    try:
        return run.place.find(run.settings.data.cache_dir) if run.settings.data.cache_dir else None
    except Lost:
        return None


def images_per_step(settings: Settings | None) -> int:
    """The global batch, 0 where nothing is trained."""
    if settings is None:
        return 0
    if isinstance(settings, config.Pretrain):
        return settings.train.global_batch_size
    return settings.batch.num_ids * settings.batch.num_instances


def find_runs(run_dir: Path) -> list[RunFolder]:
    """The directory itself and those directly in it, as far as they hold something to report.

    Raises:
        UserError: there is no such directory, or nothing to report in it.
    """
    if not run_dir.is_dir():
        problem = "is not a directory" if os.path.lexists(run_dir) else "does not exist"
        raise UserError(f"a directory with runs is required. {run_dir} {problem}")
    folders = [run_dir, *sorted(entry for entry in run_dir.iterdir() if entry.is_dir())]
    runs = [read_run(folder) for folder in folders if any((folder / n).is_file() for n in ("run.json", "result.json"))]
    if not runs:
        raise UserError(
            f"a directory with runs (run.json) or results (result.json), or one of them, is required. {run_dir} holds "
            "neither: give the directory that 'personmae pretrain', 'finetune' or 'evaluate --out' wrote to"
        )
    # The order of rows: baselines, then random, then pre-trained.
    kinds = (config.Pretrain, type(None), config.Finetune, config.Unsupervised)
    return linked(sorted(runs, key=lambda run: (kinds.index(type(run.settings)), not run.from_random, run.name)))


def find_below(run_dir: Path, known: Sequence[RunFolder]) -> list[RunFolder]:
    """Runs and evaluations with a result in deeper folders, down to the fourth, next to the ``known`` ones."""
    seen = {run.directory.resolve() for run in known}
    deeper = [folder for folder in _folders_below(run_dir, 4) if (folder / "result.json").is_file()]
    return linked([*known, *(read_run(folder) for folder in deeper if folder.resolve() not in seen)])


def _folders_below(folder: Path, depth: int) -> Iterator[Path]:
    """Folders in their order, without what is in checkpoints or cannot be listed. Links are not followed."""
    try:
        entries = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
    except OSError:
        return
    for name in entries:
        if name != "checkpoints":
            yield folder / name
            yield from _folders_below(folder / name, depth - 1) if depth > 1 else ()


def linked(runs: Sequence[RunFolder]) -> list[RunFolder]:
    """The runs, each evaluation with the run that it is of. An earlier digest of own data is replaced by the new one."""
    digests = renewed.new_digests((run.result, run.place) for run in runs if run.result)
    renew = partial(renewed.renew, digests=digests)
    runs = [replace(run, result=renew(run.result), queries=renew(run.queries)) for run in runs]
    trained = {run.directory.resolve(): run for run in runs if run.settings}
    return [replace(run, evaluated=_evaluated_run(run.result, trained)) if not run.settings else run for run in runs]


def _evaluated_run(result: Result | None, trained: Mapping[Path, RunFolder]) -> RunFolder | None:
    """The run at the recorded place, or the only one of that name where all were moved or copied."""
    where = result.run or (result.checkpoint and str(Path(result.checkpoint).parent.parent)) if result else None
    if not where or not result:
        return None
    path = Path(where).resolve()
    named = [run for run in trained.values() if run.name == path.name]
    moved = len(named) == 1 and (not path.exists() or any(found == result.digest for found in _digests(named[0].directory)))
    return trained.get(path) or (named[0] if moved else None)


def _digests(run_dir: Path) -> Iterator[str]:
    """Those of a run's checkpoints, the newest first."""
    for path in portable.folders(run_dir):
        with contextlib.suppress(OSError):
            yield portable.digest(path)


def read_run(directory: Path) -> RunFolder:
    """Everything a report needs of one directory."""
    path = directory / "config.yaml"
    try:
        info = json.loads(_text(directory / "run.json") or "{}")
        records = [_with_nan(record) for record in run_log.read_records(directory)]
        clusters = [_with_nan(json.loads(line)) for line in files.whole_lines(directory / run_log.CLUSTERS)]
    except ValueError as error:
        raise UserError(
            f"run.json, metrics.jsonl and clusters.jsonl of {directory} must be JSON. {error}. Repair or remove them"
        ) from error
    settings, result = read_settings(path) if path.is_file() else None, _parse(Result, directory / "result.json")
    return RunFolder(
        name=directory.resolve().name,
        directory=directory,
        settings=settings,
        config_yaml=_text(path),
        info=info,
        records=records,
        result=result,
        rank_lists=_parse(RankLists, directory / "rank_lists.json"),
        queries=_parse(Queries, directory / "queries.json"),
        progress=_trained(directory, settings, records, info, result) if settings else _evaluated(result),
        clusters=clusters,
    )


def _with_nan(record: Mapping[str, Any]) -> dict[str, float]:
    """JSON has no NaN, so a number that is not finite is written as null."""
    return {name: math.nan if value is None else value for name, value in record.items()}


def read_settings(path: Path) -> Settings:
    """The configuration of a run. Pre-training has no benchmark, and only unsupervised training has clusters."""
    fields = config.read(path).values
    kind = config.Unsupervised if "cluster" in fields else config.Finetune if "benchmark" in fields else config.Pretrain
    return config.load(kind, path)


def _trained(
    directory: Path, settings: Settings, records: list[dict[str, float]], info: dict[str, Any], result: Result | None
) -> RunProgress:
    """By the newest checkpoint, the last record, and the end of the newest session."""
    saved, total = _last_saved(directory)
    step = max(saved, int(records[-1]["step"]) if records else 0)
    total = total or _planned_steps(settings)
    if total is not None:
        return RunProgress(step, total, step >= total)
    ended = (info.get("sessions") or [{}])[-1].get("outcome") == "complete"
    return RunProgress(step, None, ended or result is not None)


def _evaluated(result: Result | None) -> RunProgress | None:
    """The progress of a run that was evaluated elsewhere. None where its training is unknown."""
    if result is None or result.unfinished or result.step is None or result.checkpoint is None:
        return None
    total = _state(Path(result.checkpoint)).get("total_steps")
    return RunProgress(result.step, total, result.step >= total) if total else None


def _last_saved(directory: Path) -> tuple[int, int | None]:
    """Step of the newest checkpoint and the steps of its run, or (0, None)."""
    for path in portable.folders(directory)[:1]:
        return portable.step_of(path.name) or 0, _state(path).get("total_steps")
    return 0, None


def _state(path: Path) -> dict[str, Any]:
    try:
        return json.loads((path / portable.STATE).read_bytes())
    except (OSError, ValueError):
        return {}


def _planned_steps(settings: Settings) -> int | None:
    """Steps by the configuration alone."""
    if isinstance(settings, config.Pretrain):
        return settings.train.total_steps
    return settings.train.epochs * settings.train.iters_per_epoch if isinstance(settings, config.Unsupervised) else None


def _text(path: Path) -> str:
    """Read one of our files, which is UTF-8 in every locale. File names in it may have other bytes."""
    return path.read_text(encoding="utf-8", errors="surrogateescape") if path.is_file() else ""


ModelT = TypeVar("ModelT", bound=BaseModel)


def _parse(kind: type[ModelT], path: Path) -> ModelT | None:
    try:
        return kind.model_validate(json.loads(path.read_bytes())) if path.is_file() else None
    except ValidationError as error:
        first = error.errors()[0]
        where, what = ".".join(map(str, first["loc"])) or "the file", first["msg"]
    except ValueError as error:
        where, what = "the file", f"Invalid JSON: {error}"
    raise UserError(f"{path} must be what 'personmae evaluate --out' writes. {where}: {what}. Evaluate again")
