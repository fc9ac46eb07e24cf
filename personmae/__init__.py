"""PersonMAE pre-training for person re-identification. ``load`` gives an encoder for one's own images."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from personmae.weights.encoder import Encoder


def load(path_or_name: "str | Path", *, device: "str | torch.device | None" = None, unfinished: bool = False) -> "Encoder":
    """An encoder with its preprocessing: ``load(RUN).features(images)`` gives a feature of length one for each image.

    ``path_or_name`` is a run, a checkpoint, an exported folder, or what ``personmae import`` reads. ``device`` is a GPU where
    there is one, by default. A run that has not reached its end is taken with ``unfinished`` alone.

    Raises:
        UserError: there are no such weights, they are damaged, or they are not of an encoder that can be read.
        Unavailable: they cannot be read at present.
    """
    from personmae.weights import encoder  # torch takes a second to load

    return encoder.load(path_or_name, device=device, unfinished=unfinished)
