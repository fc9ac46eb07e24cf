"""The loss on class tokens against VICReg in float64 numpy, and what its groups are for."""

import numpy as np
import pytest
import torch
from closeness import largest
from torch import Tensor, nn

from personmae.errors import UserError
from personmae.model.identity import IdentityHead, identity_loss


def embeddings(count: int = 12, dim: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator) @ torch.randn(dim, dim, generator=generator) * 0.5


def vicreg(ours: np.ndarray, theirs: np.ndarray) -> float:
    """arXiv 2105.04906, Algorithm 1, with its weights 25, 25 and 1 divided by 25."""
    count, dim = ours.shape
    total = ((ours - theirs) ** 2).mean()
    for z in (ours, theirs):
        z = z - z.mean(axis=0)
        total += np.maximum(0, 1 - np.sqrt((z**2).sum(axis=0) / (count - 1) + 1e-4)).mean()
        covariance = z.T @ z / (count - 1)
        total += sum(covariance[i, j] ** 2 for i in range(dim) for j in range(dim) if i != j) / dim / 25
    return total


@pytest.mark.parametrize("group", [2, 4, 12])
def test_it_is_vicregs_loss_as_a_mean_over_groups_of_neighbours(group):
    ours, theirs = embeddings(), embeddings(seed=1)
    x, y = ours.double().numpy(), theirs.double().numpy()
    expected = np.mean([vicreg(x[i : i + group], y[i : i + group]) for i in range(0, 12, group)])
    assert identity_loss(ours, theirs, group).item() == pytest.approx(expected, rel=1e-5)


def test_micro_batches_of_whole_groups_come_to_what_the_whole_batch_does():
    ours, theirs = embeddings(), embeddings(seed=1)
    parts = [identity_loss(ours[i : i + 6], theirs[i : i + 6], 3) for i in (0, 6)]
    assert torch.stack(parts).mean().item() == pytest.approx(identity_loss(ours, theirs, 3).item(), rel=1e-6)


def test_a_batch_smaller_than_a_group_is_one_and_groups_that_do_not_fill_it_are_refused():
    ours, theirs = embeddings(), embeddings(seed=1)
    assert identity_loss(ours, theirs, 64) == identity_loss(ours, theirs, 12)
    with pytest.raises(UserError, match=r"loss\.identity_group=5 must divide a rank's micro-batch, which is 12. Give another"):
        identity_loss(ours, theirs, 5)


def test_views_that_agree_cost_nothing_unless_they_are_all_the_same():
    spread = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 2.0], [0.0, -2.0]])  # uncorrelated, deviations above one
    assert identity_loss(spread, spread, 4).item() == pytest.approx(0.0, abs=1e-6)
    collapsed = torch.ones(4, 2)
    assert identity_loss(collapsed, collapsed, 4).item() == pytest.approx(2 * (1 - 0.01), rel=1e-5)


def test_it_has_finite_gradients_for_collapsed_embeddings_and_takes_bf16():
    ours = torch.ones(4, 2, requires_grad=True)
    identity_loss(ours, torch.zeros(4, 2), 4).backward()
    assert ours.grad is not None
    assert ours.grad.isfinite().all()
    x, y = embeddings(), embeddings(seed=1)
    rounded = identity_loss(x.bfloat16(), y.bfloat16(), 4)
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(identity_loss(x, y, 4).item(), rel=2e-2)


def test_a_few_steps_bring_views_together_and_keep_people_apart():
    torch.manual_seed(0)
    head = IdentityHead(8, 4)
    people = torch.randn(32, 8)
    views = [people + 0.1 * torch.randn(32, 8) for _ in range(2)]
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for _ in range(100):
        ours, theirs = head(torch.cat(views)).chunk(2)
        identity_loss(ours, theirs, 16).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        a, b = head(torch.cat(views)).chunk(2)
    nearest = torch.cdist(a, b).argmin(dim=1)
    assert (nearest == torch.arange(32)).float().mean() > 0.6
    assert largest([(1 - z.std(dim=0)).abs().max().item() for z in (a, b)]) < 0.5


def test_the_head_starts_as_all_other_layers_do():
    head = IdentityHead(64, 32)
    assert (head.fc1.bias == 0).all()
    assert head.fc1.weight.abs().max().item() == pytest.approx((6 / 96) ** 0.5, rel=0.05)
    assert isinstance(head.fc2, nn.Linear)
