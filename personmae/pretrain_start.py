"""Where a pre-training takes its encoder from: weights of a run, or of another project (``personmae import``)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from personmae import config
from personmae.checkpoint import portable
from personmae.config import RANDOM
from personmae.model.vit import grid_coords, rescale_coords, sample_table, trained_size
from personmae.reid.heads import settings_from


@dataclass(frozen=True, slots=True)
class Start:
    """The encoder's first weights.

    ``settings`` are those of the run with the normalisation of the weights. ``options`` are the encoder's where it came from
    another project. ``digest`` is that of all files that the weights came with.
    """

    settings: config.Pretrain
    weights: dict[str, Tensor]
    options: dict[str, Any]
    digest: str

    @property
    def options_record(self) -> dict[str, Any]:
        """What a checkpoint says of the options, beside the settings of the model."""
        return {"encoder": self.options} if self.options else {}

    def __str__(self) -> str:
        positions = "learned positions" if self.options.get("table") else "fixed positions"
        start = f"all {len(self.weights)} tensors of the encoder come from {self.settings.init}"
        return f"{start}, with {positions}. The decoders start new"


def read_start(settings: config.Pretrain) -> Start | None:
    """The weights that ``init`` names, or None for random ones.

    Learned positions are brought to the grid of the run, so that a patch keeps its place in the image. Fixed ones go on in
    steps of one.

    Raises:
        UserError: there are no such weights, or the run has another architecture or normalisation.
    """
    if settings.init == RANDOM:
        return None
    path = portable.locate(settings.init)
    weights, record = portable.read_encoder(settings.init)
    own = settings_from(settings.init, record, settings.model.model_dump(mode="json"), settings.model.model_fields_set)
    options, weights = dict(record.get("encoder") or {}), dict(weights)
    if options.get("table"):
        weights["pos_embed"], options["table"] = fit_table(weights["pos_embed"], record, settings.model)
    settings = config.with_normalisation(settings, own["mean"], own["std"])
    return Start(settings, weights, options, portable.digest(path))


def fit_table(table: Tensor, record: Mapping[str, Any], model: config.Model) -> tuple[Tensor, tuple[int, int]]:
    """A learned table (1, L, D) of the weights' ``record`` at the patches of a run, and their grid (h, w)."""
    size = model.patch_size
    grid = model.img_size[0] // size, model.img_size[1] // size
    of_weights = tuple(record["encoder"]["table"])
    coords = rescale_coords(grid_coords(grid), model.img_size, size, size, trained_size(record), record.get("trained_stride"))
    return sample_table(table, of_weights, coords)[None], grid
