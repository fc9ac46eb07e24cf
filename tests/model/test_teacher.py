"""Eq. (6): the momentum encoder and its target."""

import numpy as np
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
    with pytest.raises(ValueError, match=r"whole parameters. Gather them with engine\.full_params"):
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


# --- other targets than the normalised tokens ---


def tokens_of(teacher: Teacher, x: torch.Tensor) -> paper.Array:
    """Patch tokens after the last block in float64 numpy, (B, L, D)."""
    weights = {name: t.double().numpy() for name, t in teacher.encoder.state_dict().items()}
    coords = grid_coords(GRID).double().numpy()
    return np.stack([paper.encode(sample, coords, weights, 2, 2)[1:] for sample in x.double().numpy()])


def test_the_raw_target_is_the_last_blocks_output_itself():
    teacher, x = Teacher(encoder(), GRID, features="raw"), patches()
    assert_allclose(teacher(x).double().numpy(), tokens_of(teacher, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("features", ["position_centred", "image_centred"])
def test_a_centred_target_lacks_the_mean_of_all_batches_so_far_at_its_position(features):
    teacher, student = Teacher(encoder(), GRID, features=features), encoder(1)
    batches = [torch.randn(3, 32, 768, generator=torch.Generator().manual_seed(i)) for i in range(14)]
    mean = np.zeros((32, 32))
    for number, x in enumerate(batches):
        plain = paper.layer_norm(tokens_of(teacher, x), eps=1e-5)
        if features == "image_centred":
            plain = plain - plain.mean(axis=1, keepdims=True)
        assert_allclose(teacher.look(x).double().numpy(), plain - mean, rtol=0, atol=3e-4, err_msg=str(number))
        share = max(0.1, 1 / (number + 1))  # a plain mean at first, then a running one
        mean = (1 - share) * mean + share * plain.mean(axis=0)
        teacher.update(list(student.parameters()), 0.9)
    assert teacher.centre is not None
    assert int(teacher.centre.num_updates) == 14


def test_micro_batches_and_ranks_move_the_centre_as_the_whole_batch_does():
    x = patches(12)
    whole, parts = (Teacher(encoder(), GRID, features="position_centred") for _ in range(2))
    ranks = [Teacher(encoder(), GRID, features="position_centred") for _ in range(2)]
    same = list(encoder().parameters())
    whole.look(x)
    for i in range(0, 12, 3):
        parts.look(x[i : i + 3])
    for rank, teacher in enumerate(ranks):
        teacher.look(x[6 * rank : 6 * rank + 6])
    for teacher in (whole, parts, *ranks):
        teacher.update(same, 1.0)
    means = [teacher.centre.mean for teacher in (whole, parts, *ranks) if teacher.centre is not None]
    torch.testing.assert_close(means[1], means[0], rtol=0, atol=1e-6)
    torch.testing.assert_close((means[2] + means[3]) / 2, means[0], rtol=0, atol=1e-6)  # dist.average_buffers
    assert means[0].abs().max() > 0.1


def test_what_is_only_looked_at_or_not_finite_leaves_the_centre_where_it_is():
    teacher, same = Teacher(encoder(), GRID, features="position_centred"), list(encoder().parameters())
    assert teacher.centre is not None
    teacher(patches())
    teacher.update(same, 1.0)
    assert int(teacher.centre.num_updates) == 0
    teacher.look(patches())
    teacher.update(same, 1.0)
    before = teacher.centre.mean.clone()
    assert before.any()
    teacher.look(torch.full((1, 32, 768), float("nan")))
    teacher.update(same, 1.0)
    assert torch.equal(teacher.centre.mean, before)


def test_the_class_token_comes_first_and_is_the_online_encoders():
    student, x = encoder(), patches()
    teacher, plain = Teacher(student, GRID, class_token=True), Teacher(student, GRID)
    target = teacher(x)
    assert target.shape == (2, 33, 32)
    assert torch.equal(target[:, 1:], plain(x))
    torch.testing.assert_close(target[:, 0], student(x, grid_coords(GRID).expand(2, -1, -1))[:, 0])


def test_the_papers_teacher_keeps_no_centre_and_looks_as_it_encodes():
    teacher, x = Teacher(encoder(), GRID), patches()
    assert teacher.centre is None
    assert torch.equal(teacher.look(x), teacher(x))
    assert [name for name, _ in teacher.named_buffers()] == ["coords"]
