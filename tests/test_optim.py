"""Parameter groups and schedules."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from personmae.model.personmae import PersonMAE
from personmae.optim import adamw, lr_scale_at, param_groups, sgd

SCHEDULE = {"warmup_steps": 20, "min_ratio": 0.1}


def test_the_learning_rate_rises_in_equal_steps_to_its_peak():
    scales = [lr_scale_at(step, 100, **SCHEDULE) for step in range(20)]
    assert scales == pytest.approx([(i + 1) / 20 for i in range(20)])
    assert lr_scale_at(20, 100, **SCHEDULE) == 1.0


def test_then_it_falls_along_half_a_cosine_to_its_minimum_and_stays_there():
    scales = [lr_scale_at(step, 100, **SCHEDULE) for step in range(20, 101)]
    assert all(b < a for a, b in pairwise(scales))
    assert scales[40] == pytest.approx(0.55)  # half way
    assert scales[20] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert scales[-1] == pytest.approx(0.1)
    assert lr_scale_at(500, 100, **SCHEDULE) == pytest.approx(0.1)


@pytest.mark.parametrize(("total_steps", "warmup_steps"), [(1, 0), (1, 1), (5, 5), (3, 0)])
def test_very_short_runs_have_a_schedule_too(total_steps, warmup_steps):
    scales = [lr_scale_at(s, total_steps, warmup_steps=warmup_steps, min_ratio=0.0) for s in range(total_steps)]
    assert scales[0] == (1 / warmup_steps if warmup_steps else 1.0)
    assert all(0 < scale <= 1 for scale in scales)


def names_of(model: nn.Module, groups: list[dict]) -> list[tuple[set[str], dict]]:
    by_id = {id(p): name for name, p in model.named_parameters()}
    return [({by_id[id(p)] for p in group["params"]}, group) for group in groups]


def test_every_parameter_is_in_exactly_one_group():
    model = PersonMAE(size="micro")
    groups = param_groups(model.named_parameters(), lr=0.1, weight_decay=0.05)
    ids = [id(p) for group in groups for p in group["params"]]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in model.parameters()}


def test_vectors_and_tokens_do_not_decay_and_everything_else_does():
    model = PersonMAE(size="micro")
    spared: set[str] = set()
    for names, group in names_of(model, param_groups(model.named_parameters(), lr=0.1, weight_decay=0.05)):
        assert group["weight_decay"] == group["base_weight_decay"]
        assert group["weight_decay"] in (0.0, 0.05)
        assert (group["lr"], group["base_lr"]) == (0.1, 0.1)
        spared |= names if group["weight_decay"] == 0.0 else set()
    tokens = {"encoder.cls_token", "pixel_decoder.mask_token", "feature_decoder.mask_token"}
    assert spared == tokens | {name for name, p in model.named_parameters() if name.endswith("bias") or "norm" in name}


def test_layer_decay_shrinks_the_rate_by_its_power_below_the_top():
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    groups = param_groups(
        model.named_parameters(),
        lr=1.0,
        weight_decay=0.05,
        layer_id=lambda name: int(name.split(".")[0]),
        num_layers=3,
        layer_decay=0.5,
    )
    rates = {name: group["lr"] for names, group in names_of(model, groups) for name in names}
    assert rates == {f"{i}.{kind}": 0.5 ** (3 - i) for i in range(4) for kind in ("weight", "bias")}
    assert all(group["base_lr"] == group["lr"] for group in groups)


def test_parameters_without_gradient_are_left_out():
    model = nn.Linear(3, 3)
    model.weight.requires_grad_(False)
    groups = param_groups(model.named_parameters(), lr=0.1, weight_decay=0.05)
    assert [p is model.bias for group in groups for p in group["params"]] == [True]


def test_a_step_is_adamws_with_decoupled_decay():
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = adamw(param_groups(model.named_parameters(), lr=0.1, weight_decay=0.05), (0.9, 0.95))
    weight, bias = (p.detach().double().numpy().copy() for p in (model.weight, model.bias))
    x = torch.randn(3, 4)
    moments = {name: (np.zeros(1), np.zeros(1)) for name in ("weight", "bias")}
    for step in range(1, 6):
        model(x).square().sum().backward()
        expected = {}
        for name, value in (("weight", weight), ("bias", bias)):
            gradient = model.get_parameter(name).grad
            assert gradient is not None
            g = gradient.double().numpy()
            m, v = moments[name]
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
            moments[name] = (m, v)
            decayed = value * (1 - 0.1 * 0.05) if name == "weight" else value
            expected[name] = decayed - 0.1 * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)) ** 0.5 + 1e-8)
        optimizer.step()
        optimizer.zero_grad()
        weight, bias = expected["weight"], expected["bias"]
        torch.testing.assert_close(model.weight.detach().double(), torch.from_numpy(weight), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.bias.detach().double(), torch.from_numpy(bias), rtol=1e-4, atol=1e-5)


def test_sgd_with_a_skipped_first_update_goes_on_as_if_it_had_not_been():
    """Fused SGD by itself leaves uninitialised memory in the momentum that a skipped first update made."""

    def trained(skips: list[bool], fused: bool) -> torch.Tensor:
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 1000))
        groups = param_groups([("weight", weight)], lr=0.1, weight_decay=0.01)
        optimizer = sgd(groups, 0.9) if fused else torch.optim.SGD(groups, momentum=0.9)
        for skipped in skips:
            weight.grad = weight.detach().sin()
            if fused:
                optimizer.__dict__.update(found_inf=torch.tensor(float(skipped)), grad_scale=None)
            optimizer.step()
        return weight.detach()

    for skips in ([True, False, False], [True, True, False, True, False]):
        torch.testing.assert_close(trained(skips, True), trained([False] * skips.count(False), False))
