"""Whose weights a run began with, in words: which method its pre-training was, as far as its configuration can be read."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from personmae import config
from personmae.config import RANDOM
from personmae.errors import UserError
from personmae.report.places import Lost
from personmae.report.runs import RunFolder, Settings, read_settings

FULL: Final = "PersonMAE"
MAE_LIKE: Final = "MAE-like"
Known = Mapping[Path, Settings]


def known_settings(runs: Sequence[RunFolder]) -> dict[Path, Settings]:
    """Settings by the run's folder, so that each is read once."""
    return {run.directory.resolve(): run.settings for run in runs if run.settings}


def started_from(run: RunFolder, init: str, known: Known) -> Settings | None:
    """The settings of the run that an ``init`` of ``run`` names. None where they cannot be read."""
    try:
        directory = Path(run.place.find(init)).resolve()
        return known.get(directory) or read_settings(directory / "config.yaml")
    except (Lost, OSError, UserError):
        return None


def pretrained_as(settings: config.Pretrain) -> str:
    """What a pre-training's configuration makes of the method."""
    shifted, with_features = settings.regions.max_shift > 0, settings.loss.feature_weight > 0
    if not shifted and not with_features:
        return MAE_LIKE
    lacking = [what for what, there in (("shift", shifted), ("feature loss", with_features)) if not there]
    return FULL + "".join(f" without {what}" for what in lacking)


def weights_of(run: RunFolder, settings: Settings, known: Known) -> str:
    """The pre-training below a run, and what it was trained on before where that is so."""
    if isinstance(settings, config.Pretrain):
        return pretrained_as(settings)
    if settings.init == RANDOM:
        return "random weights"
    start = started_from(run, settings.init, known)
    if start is None:
        return Path(settings.init).name
    if isinstance(start, config.Pretrain):
        return pretrained_as(start)
    return f"{weights_of(run, start, known)}, trained on {start.benchmark} before"
