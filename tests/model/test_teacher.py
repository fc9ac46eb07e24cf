"""Eq. (6): the momentum encoder and its target."""

import paper_numpy as paper
import pytest
import torch
from closeness import assert_allclose
from torch import nn

from personmae.model.personmae import PersonMAE
from personmae.model.teacher import Teacher, momentum_at, move_towards
from personmae.model.vit import VisionTransformer, grid_coords

GRID = (8, 4)


def encoder(seed: int = 0) -> VisionTransformer:
    torch.manual_seed(seed)
    model = VisionTransformer(embed_dim=32, depth=2, num_heads=2)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.1)
    return model


def patches(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 32, 768, generator=torch.Generator().manual_seed(0))


def test_the_target_is_the_last_blocks_output_normalised_without_weights_in_float64():
    teacher, x = Teacher(encoder(), GRID), patches()
    weights = {name: t.double().numpy() for name, t in teacher.encoder.state_dict().items()}
    coords = grid_coords(GRID).double().numpy()
    for ours, sample in zip(teacher(x), x.double().numpy(), strict=True):
        expected = paper.layer_norm(paper.encode(sample, coords, weights, 2, 2)[1:], eps=1e-5)
        assert_allclose(ours.double().numpy(), expected, rtol=1e-4, atol=1e-4)


def test_after_k_updates_it_is_the_moving_average_in_float64():
    student = encoder()
    teacher = Teacher(student, GRID)
    average = {name: p.detach().double().numpy().copy() for name, p in student.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for k in range(50):
        gamma = 0.9 + 0.001 * k
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        teacher.update(list(student.parameters()), gamma)
        for name, parameter in student.named_parameters():
            average[name] = gamma * average[name] + (1 - gamma) * parameter.detach().double().numpy()
    own = dict(teacher.encoder.named_parameters())
    assert own.keys() == average.keys()
    for name, expected in average.items():
        assert_allclose(own[name].detach().double().numpy(), expected, rtol=0, atol=1e-5, err_msg=name)


def test_at_momentum_9999_ours_moves_where_a_bf16_average_stands_still():
    student = encoder()
    teacher = Teacher(student, GRID)
    before = {name: p.detach().clone() for name, p in teacher.encoder.named_parameters()}
    rounded = {name: p.bfloat16() for name, p in before.items()}
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.1)
    for _ in range(100):
        teacher.update(list(student.parameters()), 0.9999)
        rounded = {name: p.lerp(student.get_parameter(name).bfloat16(), 1e-4) for name, p in rounded.items()}
    for name, parameter in teacher.encoder.named_parameters():
        assert torch.equal(rounded[name], before[name].bfloat16()), name
        share = (parameter - before[name]) / (student.get_parameter(name) - before[name])
        assert share.median().item() == pytest.approx(1 - 0.9999**100, rel=0.02), name


def test_momentum_1_never_moves_and_momentum_0_copies():
    student, other = encoder(0), encoder(1)
    teacher = Teacher(student, GRID)
    teacher.update(list(other.parameters()), 1.0)
    assert all(torch.equal(t, s) for t, s in zip(teacher.encoder.parameters(), student.parameters(), strict=True))
    teacher.update(list(other.parameters()), 0.0)
    assert all(torch.equal(t, s) for t, s in zip(teacher.encoder.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("weight", [0.0, 1e-4, 0.1])
def test_all_tensors_at_once_move_as_each_of_them_does(weight):
    ours, theirs = ([p.detach() for p in encoder(seed).parameters()] for seed in (0, 1))
    expected = [a.lerp(b, weight) for a, b in zip(ours, theirs, strict=True)]
    move_towards(ours, theirs, torch.tensor(weight))
    for moved, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(moved, wanted, rtol=0, atol=2e-7 if weight else 0)


def test_a_skipped_step_leaves_it_where_it_is_and_any_other_moves_it_as_without_the_flag():
    student, other = encoder(0), encoder(1)
    teacher, reference = Teacher(student, GRID), Teacher(student, GRID)
    teacher.update(list(other.parameters()), 0.9, torch.tensor(1.0))
    assert all(torch.equal(t, s) for t, s in zip(teacher.encoder.parameters(), student.parameters(), strict=True))
    teacher.update(list(other.parameters()), 0.9, torch.tensor(0.0))
    reference.update(list(other.parameters()), 0.9)
    assert all(torch.equal(t, r) for t, r in zip(teacher.encoder.parameters(), reference.encoder.parameters(), strict=True))


def test_shards_of_the_student_are_refused():
    student = encoder()
    teacher = Teacher(student, GRID)
    with pytest.raises(ValueError, match=r"whole parameters; gather them with engine\.full_params"):
        teacher.update([p.flatten()[:3] for p in student.parameters()], 0.9)
    with pytest.raises(ValueError, match="whole parameters"):
        teacher.update(list(student.parameters())[1:], 0.9)


def test_it_is_an_fp32_copy_that_shares_no_memory_with_the_student():
    student = encoder().bfloat16()
    teacher = Teacher(student, GRID)
    assert {p.dtype for p in teacher.encoder.parameters()} == {torch.float32}
    student = encoder()
    teacher = Teacher(student, GRID)
    with torch.no_grad():
        student.cls_token.add_(1.0)
    assert not torch.equal(student.cls_token, teacher.encoder.cls_token)


def test_no_gradient_reaches_it_and_none_passes_through_its_target():
    model = PersonMAE(size="micro")
    teacher = Teacher(model.encoder, GRID)
    x, coords = patches(), grid_coords(GRID).expand(2, -1, -1)
    target = teacher(x.requires_grad_())
    assert not target.requires_grad
    batch = {"patches_a": x[:, :8], "coords_a": coords[:, :8], "patches_b": x, "coords_b": coords, "target": target}
    model(batch)["loss"].backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert any(p.grad is not None for p in model.encoder.parameters())


def test_its_target_has_zero_mean_and_unit_deviation_and_leaves_the_class_token_out():
    target = Teacher(encoder(), GRID)(patches())
    assert target.shape == (2, 32, 32)
    assert target.mean(-1).abs().max() < 1e-5
    assert (target.std(-1, correction=0) - 1).abs().max() < 1e-3


def test_it_stays_in_eval_mode_and_its_target_is_fp32_under_bf16_autocast():
    teacher = Teacher(encoder(), GRID, torch.bfloat16)
    assert not any(module.training for module in teacher.modules())
    target = teacher(patches())
    assert target.dtype == torch.float32
    exact = Teacher(encoder(), GRID)(patches())
    assert 0 < (target - exact).abs().mean() < 0.05


def test_its_state_is_its_encoder_alone():
    assert all(name.startswith("encoder.") for name in Teacher(encoder(), GRID).state_dict())


# --- gamma ---

PAPER = {"momentum": (0.999, 0.9999), "ramp_fraction": 0.2}


def test_momentum_rises_linearly_over_the_first_fifth_and_then_stays():
    assert momentum_at(0, 1000, **PAPER) == 0.999
    assert momentum_at(100, 1000, **PAPER) == pytest.approx(0.99945, abs=1e-12)
    assert momentum_at(200, 1000, **PAPER) == pytest.approx(0.9999, abs=1e-12)
    assert momentum_at(1000, 1000, **PAPER) == momentum_at(200, 1000, **PAPER)
    values = [momentum_at(step, 1000, **PAPER) for step in range(1000)]
    assert values == sorted(values)


def test_horizon_scaling_keeps_the_averages_share_of_the_run():
    for step in (0, 50, 150, 1000):
        plain, scaled = (momentum_at(step, 1000, **PAPER, reference_steps=r) for r in (None, 5000))
        assert 1 - scaled == pytest.approx(5 * (1 - plain), rel=1e-9)
    assert momentum_at(10, 2000, **PAPER, reference_steps=2000) == pytest.approx(momentum_at(10, 2000, **PAPER))


def test_horizon_scaling_stops_at_one_half():
    assert momentum_at(0, 10, **PAPER, reference_steps=204_100) == 0.5


def test_no_ramp_means_the_final_momentum_from_the_second_step_on():
    assert momentum_at(1, 100, momentum=(0.9, 0.99), ramp_fraction=0.0) == pytest.approx(0.99)
