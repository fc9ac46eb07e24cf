"""The floor of the pixel loss: what predictors score that know next to nothing of an image.

One knows the position of a patch alone: it predicts the mean of all images there. The other knows the image's mean hue too,
which is the mean of its normalised patches (Eq. 5, left) for each colour, three numbers. It adds to each colour of each patch a
linear function of them, by least squares. Both scores are estimated without bias from the first images that a run trains on.
A run that ends near them has learned nothing of the people in the images.
"""

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from personmae import dist
from personmae.model.inputs import Batch
from personmae.model.personmae import pixel_target

NUM_IMAGES: Final = 512  # at least so many, in whole global batches
MARGIN: Final = 0.05  # a loss that is not so much below the floor has hardly left it
_COLOURS: Final = 3
_CUT: Final = {"rtol": 1e-6, "atol": 1e-10}  # what of a covariance is rounding


class Floor(NamedTuple):
    """The scores of both predictors on the pixel loss."""

    position: float
    hue: float
    num_images: int

    def __str__(self) -> str:
        known = f"{self.position:.3f} from a patch's position alone, {self.hue:.3f} with the image's mean hue"
        return f"floor of the pixel loss: {known} ({self.num_images:,} images)"


class Moments(NamedTuple):
    """Sums over images. ``values`` are an image's mean hue and the hues of its L patches, one after the other."""

    num_images: Tensor  # ()
    pixels: Tensor  # (L, P)
    squares: Tensor  # (), over patches and pixels too
    values: Tensor  # (3 + 3 L)
    products: Tensor  # (3, 3 + 3 L) of the mean hue with all of them
    hue_squares: Tensor  # (), over patches and colours too


def moments_of(target: Float[Tensor, "B L P"]) -> Moments:
    """Of normalised patches, in float64."""
    hues = target.unflatten(2, (_COLOURS, -1)).mean(dim=3).double()  # (B, L, 3)
    mean_hue = hues.mean(dim=1)
    values = torch.cat([mean_hue, hues.flatten(1)], dim=1)
    return Moments(
        num_images=torch.tensor(float(len(target)), dtype=torch.float64, device=target.device),
        pixels=target.sum(dim=0).double(),
        squares=target.square().sum().double(),
        values=values.sum(dim=0),
        products=mean_hue.T @ values,
        hue_squares=hues.square().sum(),
    )


def floor_of(moments: Moments) -> Floor:
    """Both scores: residual sums of squares over what is left of the number of images, for each patch and pixel.

    The mean hue explains hues of patches alone, so only those lose what it takes to fit it.
    """
    count = moments.num_images.item()
    mean, mean_values = moments.pixels / count, moments.values / count
    covariance = moments.products / count - mean_values[:_COLOURS, None] * mean_values
    own, others = covariance[:, :_COLOURS], covariance[:, _COLOURS:]
    inverse = torch.linalg.pinv(own, **_CUT, hermitian=True)  # of rank 2: a normalised patch's three means add up to 0
    rank = int(torch.linalg.matrix_rank(own, **_CUT, hermitian=True))
    pixels_of_a_colour = mean.shape[1] / _COLOURS
    explained = pixels_of_a_colour * (others * (inverse @ others)).sum()
    of_hues = pixels_of_a_colour * (moments.hue_squares / count - mean_values[_COLOURS:].square().sum())
    of_position = moments.squares / count - mean.square().sum()
    position = of_position * count / max(1.0, count - 1)
    hue = position - of_hues * count / max(1.0, count - 1) + (of_hues - explained) * count / max(1.0, count - 1 - rank)
    return Floor((position / mean.numel()).item(), (hue / mean.numel()).item(), round(count))


class FloorEstimate:
    """The floor from the first steps of a run, over all ranks alike. Nothing is done where it is ``known`` already."""

    def __init__(self, known: Floor | None, *, steps_left: int, global_batch_size: int):
        wanted = -(-NUM_IMAGES // global_batch_size)
        self._steps = 0 if known else min(wanted, steps_left)
        self._num_images = self._steps * global_batch_size
        self._moments: Moments | None = None

    def add(self, batch: Batch) -> None:
        """Look at a micro-batch of the next step."""
        if not self._steps:
            return
        target = batch["pixel_target"] if "pixel_target" in batch else pixel_target(batch["patches_b"])
        new = moments_of(target)
        old = self._moments
        self._moments = new if old is None else Moments(*(a + b for a, b in zip(old, new, strict=True)))

    def step(self) -> Floor | None:
        """A step is done, by all ranks. Returns the floor at the one with which it is known."""
        if not self._steps:
            return None
        self._steps -= 1
        if self._steps or self._moments is None:
            return None
        mine = torch.cat([moment.flatten() for moment in self._moments])
        whole = dist.mean(mine) * (self._num_images / dist.mean(self._moments.num_images))
        parts = whole.split([moment.numel() for moment in self._moments])
        shaped = [part.reshape(moment.shape) for part, moment in zip(parts, self._moments, strict=True)]
        self._moments = None
        return floor_of(Moments(*shaped))


def floor_warning(floor: Floor, records: Sequence[Mapping[str, float]]) -> str:
    """What to say of a run whose pixel loss has not left the floor, by the last tenth of what it has logged. Else nothing."""
    losses = [record["pixel_loss"] for record in records if "pixel_loss" in record]
    if not losses:
        return ""
    last = losses[-max(1, len(losses) // 10) :]
    loss = sum(last) / len(last)
    lowest = min(floor.position, floor.hue)
    if loss < (1 - MARGIN) * lowest:
        return ""
    return (
        f"warning: the pixel loss has ended at {loss:.3f}, which is not {MARGIN:.0%} below the {floor}: the encoder has "
        "learned hardly more. Try more steps, a higher optim.base_lr, or a mask that shows more of the person, such as "
        "mask.kind=random"
    )
