"""The momentum encoder E_m of Eq. (6): an fp32 moving average of the online encoder that never receives a gradient."""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from personmae.model.vit import VisionTransformer, grid_coords


class Teacher(nn.Module):
    """Encodes all of RegionB, as a picture of its own, into the feature targets."""

    def __init__(self, encoder: VisionTransformer, grid: tuple[int, int], compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.encoder = copy.deepcopy(encoder).float().requires_grad_(False)
        self.compute_dtype = compute_dtype
        self.register_buffer("coords", grid_coords(grid), persistent=False)
        self.coords: Tensor
        self.eval()

    @torch.no_grad()
    def forward(self, patches_b: Float[Tensor, "B L P"]) -> Float[Tensor, "B L D"]:
        """F_b of Eq. (6): patch tokens after the last block, each layer-normalised without weights."""
        with torch.autocast(patches_b.device.type, self.compute_dtype, self.compute_dtype != torch.float32):
            tokens = self.encoder.forward_features(patches_b, self.coords.expand(len(patches_b), -1, -1))
        return F.layer_norm(tokens[:, 1:].float(), tokens.shape[-1:])

    @torch.no_grad()
    def update(self, params: Sequence[Tensor], momentum: float, skipped: Tensor | None = None) -> None:
        """Eq. (6): theta_m <- gamma theta_m + (1 - gamma) theta_o, in fp32.

        ``params`` are the online encoder's, whole and in order. ``skipped`` is a scalar on the device, 1 where the online
        encoder was not updated: then the average stands still too.
        """
        ours: list[Tensor] = list(self.encoder.parameters())
        if [p.shape for p in params] != [p.shape for p in ours]:
            raise ValueError("the teacher needs the online encoder's whole parameters; gather them with engine.full_params")
        weight = 1 - momentum
        if skipped is not None:
            weight = (1 - skipped) * weight
        if skipped is None or skipped.is_cpu:
            torch._foreach_lerp_(ours, list(params), float(weight))  # pyright: ignore[reportPrivateImportUsage]
        else:
            move_towards(ours, params, weight)


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
