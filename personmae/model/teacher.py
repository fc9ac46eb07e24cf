"""The momentum encoder E_m of Eq. (6): an fp32 moving average of the online encoder that never receives a gradient."""

import copy
from collections.abc import Sequence
from typing import Final, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from personmae.model.vit import VisionTransformer, grid_coords

Features = Literal["layer_norm", "raw", "position_centred", "image_centred"]
CENTRE_MOMENTUM: Final = 0.9  # of the mean at each position


class Centre(nn.Module):
    """The mean of the features at each position over all images, as a running mean of the global batches.

    ``forward`` takes it away and changes nothing. ``add`` takes in a micro-batch, and ``update`` moves the mean
    once a step: to the mean of all batches so far, and from the tenth on by a tenth. Its buffers are a rank's own until
    they are averaged over ranks (``dist.average_buffers``).
    """

    def __init__(self, num_patches: int, dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_patches, dim))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        self.mean: Tensor
        self.num_updates: Tensor
        self._noted: list[Tensor] = []

    def forward(self, features: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        return features - self.mean

    @torch.no_grad()
    def add(self, centred: Float[Tensor, "B L D"]) -> None:
        """Remember the mean of what ``forward`` has returned."""
        self._noted.append(centred.mean(dim=0) + self.mean)

    @torch.no_grad()
    def update(self) -> None:
        """Move the mean towards that of the micro-batches since the last update. What is not finite does not count."""
        if not self._noted:
            return
        seen = torch.stack(self._noted).mean(dim=0)
        self._noted.clear()
        self.num_updates += 1
        weight = (1 / self.num_updates).clamp(min=1 - CENTRE_MOMENTUM)
        self.mean += weight * (torch.where(seen.isfinite(), seen, self.mean) - self.mean)


class Teacher(nn.Module):
    """Encodes all of RegionB, as an image of its own, into the feature targets.

    ``features`` chooses the targets, from the patch tokens after the last block: ``layer_norm`` each token normalised
    without weights, ``raw`` the tokens unchanged, ``position_centred`` the normalised ones less the mean of all images at
    their position, ``image_centred`` less the mean of their image before that. With ``class_token`` the normalised class
    token stands before them, as the online encoder has it.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        grid: tuple[int, int],
        compute_dtype: torch.dtype = torch.float32,
        *,
        features: Features = "layer_norm",
        class_token: bool = False,
    ):
        super().__init__()
        self.encoder = copy.deepcopy(encoder).float().requires_grad_(False)
        self.compute_dtype, self.features, self.class_token = compute_dtype, features, class_token
        is_centred = features in ("position_centred", "image_centred")
        self.centre = Centre(grid[0] * grid[1], encoder.embed_dim) if is_centred else None
        self.register_buffer("coords", grid_coords(grid), persistent=False)
        self.coords: Tensor
        self.eval()

    @torch.no_grad()
    def forward(self, patches_b: Float[Tensor, "B L P"]) -> Float[Tensor, "B T D"]:
        """F_b of Eq. (6): a target for each patch, after the class token where there is one."""
        with torch.autocast(patches_b.device.type, self.compute_dtype, self.compute_dtype != torch.float32):
            tokens = self.encoder.forward_features(patches_b, self.coords.expand(len(patches_b), -1, -1))
            first = self.encoder.norm(tokens[:, :1]) if self.class_token else None
        target = self._target(tokens[:, 1:].float())
        return target if first is None else torch.cat([first.float(), target], dim=1)

    def _target(self, tokens: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        if self.features == "raw":
            return tokens
        target = F.layer_norm(tokens, tokens.shape[-1:])
        if self.features == "image_centred":
            target = target - target.mean(dim=1, keepdim=True)
        return target if self.centre is None else self.centre(target)

    def look(self, patches_b: Float[Tensor, "B L P"]) -> Float[Tensor, "B T D"]:
        """``forward`` in training: where targets are centred, what they are is remembered for the next ``update``."""
        target = self(patches_b)
        if self.centre is not None:
            self.centre.add(target[:, 1:] if self.class_token else target)
        return target

    @torch.no_grad()
    def update(self, params: Sequence[Tensor], momentum: float, skipped: Tensor | None = None) -> None:
        """Eq. (6): theta_m <- gamma theta_m + (1 - gamma) theta_o, in fp32.

        ``params`` are the online encoder's, whole and in order. ``skipped`` is a scalar on the device, 1 where the online
        encoder was not updated: then the average does not change either.
        """
        ours: list[Tensor] = list(self.encoder.parameters())
        if [p.shape for p in params] != [p.shape for p in ours]:
            raise ValueError("the teacher needs the online encoder's whole parameters. Gather them with engine.full_params")
        weight = 1 - momentum
        if skipped is not None:
            weight = (1 - skipped) * weight
        if skipped is None or skipped.is_cpu:
            torch._foreach_lerp_(ours, list(params), float(weight))  # pyright: ignore[reportPrivateImportUsage]
        else:
            move_towards(ours, params, weight)
        if self.centre is not None:
            self.centre.update()


def move_towards(ours: list[Tensor], theirs: Sequence[Tensor], weight: Tensor | float) -> None:
    """``lerp_`` of many tensors by a weight that is on the device, for which ``_foreach_lerp_`` goes tensor by tensor."""
    moved = torch._foreach_sub(list(theirs), ours)  # pyright: ignore[reportPrivateImportUsage]
    torch._foreach_mul_(moved, weight)  # pyright: ignore[reportPrivateImportUsage]
    torch._foreach_add_(ours, moved)  # pyright: ignore[reportPrivateImportUsage]


def momentum_at(
    step: int,
    total_steps: int,
    *,
    momentum: tuple[float, float],
    ramp_fraction: float,
    reference_steps: int | None = None,
) -> float:
    """gamma at a step: linear between the two values over the first ``ramp_fraction`` of the run, then constant.

    With ``reference_steps`` the averaging horizon keeps its share of the run: 1 - gamma is multiplied by
    ``reference_steps / total_steps`` (at most to gamma = 0.5).
    """
    ramp = min(1.0, step / max(1.0, ramp_fraction * total_steps))
    gamma = momentum[0] + (momentum[1] - momentum[0]) * ramp
    if reference_steps is None:
        return gamma
    return 1.0 - min(0.5, (1.0 - gamma) * reference_steps / total_steps)
