"""A loss on class tokens beyond the paper: RegionA and RegionB show one person, and their class tokens should say so.

The loss is VICReg's (arXiv 2105.04906) with its weights over 25. It has the distance of both embeddings, a hinge that keeps
the deviation of each channel at one, and the covariance between channels. Deviation and covariance are taken over groups
of neighbouring images, so they depend neither on the micro-batch nor on the number of ranks.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from personmae.errors import UserError
from personmae.model.vit import init_weights

COVARIANCE_WEIGHT = 1 / 25  # VICReg's 1, beside 25 for the two others
_EPS = 1e-4  # in the deviation, as VICReg has it


class IdentityHead(nn.Module):
    """Projects class tokens to the embeddings that are compared."""

    def __init__(self, encoder_dim: int, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(encoder_dim, dim)
        self.fc2 = nn.Linear(dim, dim, bias=False)  # the loss does not see what all embeddings share
        init_weights(self)

    def forward(self, tokens: Float[Tensor, "B D"]) -> Float[Tensor, "B E"]:
        return self.fc2(F.gelu(self.fc1(tokens)))


def identity_loss(ours: Float[Tensor, "B E"], theirs: Float[Tensor, "B E"], group_size: int) -> Float[Tensor, ""]:
    """VICReg over 25 between embeddings of two views, as a mean over groups of ``group_size`` neighbours.

    A batch that is smaller is one group.

    Raises:
        UserError: groups do not fill the batch.
    """
    size = min(group_size, len(ours))
    if len(ours) % size:
        raise UserError(
            f"loss.identity_group={size} must divide a rank's micro-batch, which is {len(ours)}. Give another, or another "
            "train.max_micro_batch_size"
        )
    ours, theirs = ours.float(), theirs.float()
    spread = torch.stack([_spread(embeddings.unflatten(0, (-1, size))) for embeddings in (ours, theirs)])
    return F.mse_loss(ours, theirs) + spread.sum()


def _spread(groups: Float[Tensor, "G n E"]) -> Float[Tensor, ""]:
    """How far channels are from a deviation of one and from having nothing in common."""
    size, dim = groups.shape[1:]
    centred = groups - groups.mean(dim=1, keepdim=True)
    covariance = centred.transpose(1, 2) @ centred / max(1, size - 1)  # (G, E, E)
    variance = covariance.diagonal(dim1=1, dim2=2)
    hinge = F.relu(1 - (variance + _EPS).sqrt()).mean()
    between = (covariance.square().sum(dim=(1, 2)) - variance.square().sum(dim=1)).mean() / dim
    return hinge + COVARIANCE_WEIGHT * between
