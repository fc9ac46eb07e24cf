"""From canvases to both losses: Eq. (3), (5), (7) and (8) alone, then the whole forward pass in float64 numpy."""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import paper_numpy as paper
import pytest
import torch
from closeness import assert_allclose
from small_models import HEADS, SPEC, a_batch, a_model, numpy_batch, patches, weights_of, with_target

from personmae.model.inputs import Draws, RegionSpec, cut_batch, draw_batch, normalise, prepare_batch
from personmae.model.masking import block_mask, person_mask, random_mask
from personmae.model.personmae import PersonMAE, feature_loss, pixel_loss, pixel_target
from personmae.model.regions import uniforms
from personmae.model.teacher import Teacher
from personmae.model.vit import patchify, take_tokens, unpatchify

# --- from canvases to tokens ---


def test_the_canvas_has_room_for_the_largest_size_of_eq1():
    paper_spec = dataclasses.replace(SPEC, img_size=(256, 128), max_shift=64)
    assert paper_spec.canvas_size == (480, 240)  # 3/2 of [256 + 64, 128 + 32]
    assert paper_spec.grid == (16, 8)


def test_a_batch_of_tokens_equals_eq1_to_eq4_in_float64():
    canvas, size, draws = a_batch()
    assert draws.regions.flip.any()
    assert not draws.regions.flip.all()
    ours = cut_batch(canvas, size, draws, SPEC)
    for i, sample in enumerate(numpy_batch(canvas, size, draws, SPEC)):
        for name, expected in sample.items():
            assert_allclose(ours[name][i].double().numpy(), expected, rtol=0, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("kind", ["block", "random", "person"])
def test_the_encoder_sees_the_patches_that_the_mask_of_eq3_leaves(kind):
    spec = dataclasses.replace(SPEC, mask_kind=kind)
    keys, native = torch.arange(50), torch.tensor([[200, 100]]).expand(50, -1)
    draws = draw_batch(keys, native, spec)
    if kind == "random":
        mask = random_mask(keys, (8, 4), 0.75)
    else:
        mask = {"block": block_mask, "person": person_mask}[kind](keys, (8, 4), 0.75, min_block=4)
    assert draws.ids_keep.shape == (50, 32 - round(0.75 * 32))
    for row, ids in zip(mask, draws.ids_keep, strict=True):
        assert ids.tolist() == [i for i in range(32) if not row[i]]


def test_with_all_visible_and_no_shift_both_regions_are_the_same():
    spec = dataclasses.replace(SPEC, max_shift=0)
    canvas, size, draws = a_batch(spec=spec)
    batch = cut_batch(canvas, size, draws._replace(ids_keep=torch.arange(32).expand(3, -1)), spec)
    assert torch.equal(batch["patches_a"], batch["patches_b"])
    assert torch.equal(batch["coords_a"], batch["coords_b"])


def test_tokens_of_a_sample_do_not_depend_on_its_batch():
    canvas, size, draws = a_batch()
    whole = cut_batch(canvas, size, draws, SPEC)
    first = Draws(type(draws.regions)(*(t[:1] for t in draws.regions)), draws.ids_keep[:1])
    for name, tensor in cut_batch(canvas[:1], size[:1], first, SPEC).items():
        torch.testing.assert_close(tensor, whole[name][:1], rtol=0, atol=1e-5)


def test_normalised_pixels_are_those_of_torchvision():
    images = torch.rand(2, 3, 8, 4, generator=torch.Generator().manual_seed(0)) * 255
    ours = unpatchify(normalise(patchify(images, 4), SPEC.mean, SPEC.std), (2, 1), 4)
    for c in range(3):
        torch.testing.assert_close(ours[:, c], (images[:, c] / 255 - SPEC.mean[c]) / SPEC.std[c])


def test_on_a_cpu_a_batch_is_prepared_to_a_grey_level_or_two_of_the_plain_way():
    canvas, size, _ = a_batch(12)
    canvas = canvas // 2 + 64  # overshoots stay in range: they are clipped after each pass
    native, keys = torch.tensor([[200, 100], [90, 41], [300, 140]]).repeat(4, 1), torch.arange(12) * 977 + 13
    plain, ours = cut_batch(canvas, size, draw_batch(keys, native, SPEC), SPEC), prepare_batch(canvas, size, native, keys, SPEC)
    level = 1 / (255 * min(SPEC.std))
    for name, expected in plain.items():
        if name.startswith("coords"):
            assert torch.equal(ours[name], expected)
        else:
            assert not torch.equal(ours[name], expected)  # the other way was at work
            assert (ours[name] - expected).abs().max() < 1.6 * level
            assert (ours[name] - expected).abs().mean() < 0.4 * level


# --- Eq. (5) ---


def test_eq5_target_equals_float64_and_has_zero_mean_and_unit_deviation():
    x = patches()
    for ours, sample in zip(pixel_target(x), x.double().numpy(), strict=True):
        assert_allclose(ours.double().numpy(), paper.eq5_target(sample), rtol=1e-5, atol=1e-5)
    assert pixel_target(x).mean(-1).abs().max() < 1e-5
    assert (pixel_target(x).std(-1) - 1).abs().max() < 1e-5


def test_eq5_target_of_a_flat_patch_is_zero_and_not_nan():
    assert (pixel_target(torch.full((1, 2, 48), 0.7)).abs() < 1e-3).all()


def test_eq5_loss_equals_float64():
    x, z = patches(), patches(seed=1)
    pairs = zip(x.double().numpy(), z.double().numpy(), strict=True)
    expected = np.mean([paper.eq5_loss(sample, predicted) for sample, predicted in pairs])
    assert pixel_loss(z, pixel_target(x)).item() == pytest.approx(expected, rel=1e-5)


def test_eq5_is_computed_in_fp32_from_bf16_predictions():
    x, z = patches(), patches(seed=1)
    assert pixel_loss(z.bfloat16(), x).dtype == torch.float32
    assert pixel_loss(z.bfloat16(), x).item() == pytest.approx(pixel_loss(z, x).item(), rel=1e-2)


# --- Eq. (7) ---


@pytest.mark.parametrize(
    ("distance", "expected"), [(0.0, 0.0), (1.0, 0.25), (-1.0, 0.25), (2.0, 1.0), (3.0, 2.0), (-10.0, 9.0)]
)
def test_eq7_with_beta_2_is_a_quarter_square_below_2_and_distance_less_1_above(distance, expected):
    target = torch.zeros(1, 1, 4)
    assert feature_loss(target + distance, target, 2.0).item() == expected


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_eq7_equals_float64(beta):
    y, f = patches(), patches(seed=1)
    expected = paper.eq7_loss(f.double().numpy(), y.double().numpy(), beta)
    assert feature_loss(y, f, beta).item() == pytest.approx(expected, rel=1e-5)


# --- Eq. (8) and the whole forward pass ---


@pytest.mark.parametrize("weight", [0.5, 1.0, 2.0])
def test_eq8_adds_the_weighted_feature_loss(weight):
    model = a_model(feature_weight=weight)
    losses = model(with_target(model))
    assert losses["loss"].item() == pytest.approx(losses["pixel_loss"].item() + weight * losses["feature_loss"].item())


def test_without_feature_weight_there_is_no_feature_decoder_and_no_target_is_needed():
    model = a_model(feature_weight=0.0)
    losses = model(cut_batch(*a_batch(), SPEC))
    assert losses.keys() == {"loss", "pixel_loss"}
    assert torch.equal(losses["loss"], losses["pixel_loss"])
    assert not any(name.startswith("feature_decoder") for name, _ in model.named_parameters())


def test_the_whole_forward_pass_equals_float64_numpy():
    model, (canvas, size, draws) = a_model(beta=0.7, feature_weight=1.5), a_batch()
    teacher = Teacher(a_model().encoder, SPEC.grid)
    for parameter in teacher.encoder.parameters():
        parameter.add_(0.01)  # not the student's weights
    weights, teacher_weights = weights_of(model), weights_of(teacher.encoder)
    pixel, feature = [], []
    for sample in numpy_batch(canvas, size, draws, SPEC):
        encoder = paper.below(weights, "encoder")
        tokens = paper.layer_norm(
            paper.encode(sample["patches_a"], sample["coords_a"], encoder, 4, HEADS["encoder"]), encoder, "norm"
        )
        z, y = (
            paper.decode(tokens, sample["coords_b"], paper.below(weights, name), 2, HEADS[name])
            for name in ("pixel_decoder", "feature_decoder")
        )
        coords = paper.eq4_coords(SPEC.grid, 0, 0, 16)  # RegionB is an image of its own to the teacher
        target = paper.layer_norm(paper.encode(sample["patches_b"], coords, teacher_weights, 4, HEADS["encoder"])[1:], eps=1e-5)
        pixel.append(paper.eq5_loss(sample["patches_b"], z))
        feature.append(paper.eq7_loss(target, y, 0.7))
    batch = cut_batch(canvas, size, draws, SPEC)
    losses = model(batch | {"target": teacher(batch["patches_b"])})
    assert losses["pixel_loss"].item() == pytest.approx(np.mean(pixel), rel=1e-4)
    assert losses["feature_loss"].item() == pytest.approx(np.mean(feature), rel=1e-4)
    assert losses["loss"].item() == pytest.approx(np.mean(pixel) + 1.5 * np.mean(feature), rel=1e-4)


def test_every_parameter_receives_a_gradient():
    model = a_model()
    model(with_target(model))["loss"].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_bf16_autocast_stays_near_fp32_and_gives_fp32_losses():
    exact, rounded = a_model(), a_model(compute_dtype=torch.bfloat16)
    batch = with_target(exact)
    for name, loss in rounded(batch).items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact(batch)[name].item(), rel=2e-2)
    assert {p.dtype for p in rounded.parameters()} == {torch.float32}


def test_decoder_widths_follow_the_encoder_unless_given():
    base = PersonMAE(size="small")
    assert base.pixel_decoder.embed.out_features == 384
    assert base.feature_decoder is not None
    assert base.feature_decoder.embed.out_features == base.feature_decoder.head.out_features == 384
    with torch.device("meta"):
        assert PersonMAE(size="base").pixel_decoder.embed.out_features == 512
    narrow = PersonMAE(size="micro", pixel_dim=64, feature_dim=96 + 32, decoder_depth=1)
    assert narrow.pixel_decoder.embed.out_features == 64
    assert len(narrow.pixel_decoder.blocks) == 1


def test_a_decoder_is_told_where_region_b_lies_by_its_mask_tokens_alone():
    model, batch = a_model(), cut_batch(*a_batch(), SPEC)
    tokens = model.encoder(batch["patches_a"], batch["coords_a"])
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    straight = model.pixel_decoder(tokens, batch["coords_b"])
    torch.testing.assert_close(
        model.pixel_decoder(tokens, batch["coords_b"][:, order]), straight[:, order], rtol=1e-3, atol=1e-4
    )
    moved = model.pixel_decoder(tokens, batch["coords_b"] + 1.0)
    assert (moved - straight).abs().max() > 1e-3


def test_a_few_steps_on_one_batch_lower_both_losses():
    torch.manual_seed(0)
    model = PersonMAE(size="micro")
    batch = with_target(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    history = []
    for _ in range(25):
        losses = model(batch)
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append((losses["pixel_loss"].item(), losses["feature_loss"].item()))
    assert history[-1][0] < 0.9 * history[0][0]
    assert history[-1][1] < 0.7 * history[0][1]


def test_predicted_pixels_are_those_the_loss_compares():
    model = a_model()
    batch = with_target(model)
    predicted = model.predict_pixels(batch)
    assert torch.equal(pixel_loss(predicted, pixel_target(batch["patches_b"])), model(batch)["pixel_loss"])
    assert unpatchify(predicted, SPEC.grid, 16).shape == (3, 3, 128, 64)


def test_taken_tokens_are_those_at_the_indices():
    x, ids = patches(), torch.tensor([[4, 0], [1, 1]])
    assert torch.equal(take_tokens(x, ids), torch.stack([x[0, [4, 0]], x[1, [1, 1]]]))


# Without vectors: what the compiler makes of the drawing for AVX2 crashes, and no CPU runs it compiled.
COMPILED = """
import torch
torch._inductor.config.cpp.simdlen = 1
from dataclasses import replace
from personmae.model.inputs import cut_batch, draw_batch
from small_models import SPEC, a_batch
canvas, size, _ = a_batch()
native, keys = size * 2, torch.arange(len(size)) * 977 + 13
spec = replace(SPEC, **{changes})
def prepare():
    return cut_batch(canvas, size, draw_batch(keys, native, spec), spec)
compiled = torch.compile(prepare)()
for name, expected in prepare().items():
    torch.testing.assert_close(compiled[name], expected, rtol=0, atol=1e-4)
"""


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize("changes", [{}, {"mask_kind": "person", "block_ratio": 0.6}], ids=["block", "person"])
def test_compiled_drawing_and_cutting_equal_eager_ones(request, changes):
    here = request.path.parent  # a process of its own: the shape checks of conftest.py are not for the compiler
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED.format(changes=changes)],
        cwd=here,
        env=environ,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr


def test_numbers_for_masks_and_regions_come_from_different_streams():
    keys = torch.arange(4000)
    draws = draw_batch(keys, torch.tensor([[200, 100]]).expand(4000, -1), SPEC)
    kept = torch.zeros(4000, 32).scatter(1, draws.ids_keep, 1.0)
    columns = torch.cat([draws.regions.scale[:, None].float(), uniforms(keys, 1, 4), kept], dim=1)
    correlation = torch.corrcoef(columns.T)[:5, 5:]
    assert correlation.abs().max() < 5 / 4000**0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "dtype", "millions"),
    [("small", torch.bfloat16, 21.7), ("small", torch.float32, 21.7), ("base", torch.float32, 85.7)],
)
def test_the_papers_sizes_learn_from_a_batch_at_256_by_128(size, dtype, millions):
    spec = RegionSpec((256, 128), 16, SPEC.mean, SPEC.std, 64, SPEC.crop_scale, SPEC.crop_ratio, 0.5, "block", 0.75, 4)
    model = PersonMAE(size=size, compute_dtype=dtype)
    model.encoder.activation_checkpointing = "full"
    assert sum(p.numel() for p in model.encoder.parameters()) / 1e6 == pytest.approx(millions, abs=0.2)
    batch = cut_batch(*a_batch(count=2, spec=spec), spec)
    assert batch["patches_a"].shape == (2, 32, 768)
    assert batch["patches_b"].shape == (2, 128, 768)
    batch["target"] = Teacher(model.encoder, spec.grid, dtype)(batch["patches_b"])
    losses = model(batch)
    losses["loss"].backward()
    assert losses["loss"].isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
