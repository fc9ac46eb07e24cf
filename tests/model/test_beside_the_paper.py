"""Options beside the paper: where decoders are told what lies, how targets are summed, and the signal of identity."""

import numpy as np
import paper_numpy as paper
import pytest
import torch
from small_models import HEADS, SPEC, a_batch, a_model, numpy_batch, patches, weights_of, with_target

from personmae.model.identity import identity_loss
from personmae.model.inputs import cut_batch
from personmae.model.personmae import PersonMAE, feature_loss, pixel_loss, pixel_target, spread_over_images
from personmae.model.teacher import Teacher


def test_decoders_that_are_told_where_the_visible_patches_lie_equal_float64_numpy():
    model, (canvas, size, draws) = a_model(visible_positions=True), a_batch()
    weights, pixel, feature = weights_of(model), [], []
    teacher = Teacher(model.encoder, SPEC.grid)
    batch = cut_batch(canvas, size, draws, SPEC)
    batch["target"] = teacher(batch["patches_b"])
    samples = numpy_batch(canvas, size, draws, SPEC)
    for sample, target in zip(samples, batch["target"].double().numpy(), strict=True):
        encoder = paper.below(weights, "encoder")
        tokens = paper.encode(sample["patches_a"], sample["coords_a"], encoder, 4, HEADS["encoder"])
        tokens = paper.layer_norm(tokens, encoder, "norm")
        z, y = (
            paper.decode(tokens, sample["coords_b"], paper.below(weights, name), 2, HEADS[name], sample["coords_a"])
            for name in ("pixel_decoder", "feature_decoder")
        )
        pixel.append(paper.eq5_loss(sample["patches_b"], z))
        feature.append(paper.eq7_loss(target, y, 2.0))
    losses = model(batch)
    assert losses["pixel_loss"].item() == pytest.approx(np.mean(pixel), rel=1e-4)
    assert losses["feature_loss"].item() == pytest.approx(np.mean(feature), rel=1e-4)
    plain = a_model()(batch)
    assert abs(losses["pixel_loss"].item() / plain["pixel_loss"].item() - 1) > 1e-3
    torch.testing.assert_close(pixel_loss(model.predict_pixels(batch), pixel_target(batch["patches_b"])), losses["pixel_loss"])


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_summed_over_channels_eq7_is_as_many_times_larger_as_there_are_channels(beta):
    y, f = patches(), patches(seed=1)
    expected = 48 * paper.eq7_loss(f.double().numpy(), y.double().numpy(), beta)
    assert feature_loss(y, f, beta, "sum").item() == pytest.approx(expected, rel=1e-5)
    model, batch = a_model(reduction="sum"), with_target(a_model())
    assert model(batch)["feature_loss"].item() == pytest.approx(128 * a_model()(batch)["feature_loss"].item(), rel=1e-5)


def test_the_identity_loss_compares_the_class_tokens_of_both_regions():
    model = a_model(identity_weight=0.7, identity_dim=16)
    assert model.needs_teacher
    batch = cut_batch(*a_batch(4), SPEC)
    target = Teacher(model.encoder, SPEC.grid, class_token=True)(batch["patches_b"])
    losses = model(batch | {"target": target})
    assert list(losses) == ["loss", "pixel_loss", "feature_loss", "identity_loss", "target_std"]
    tokens = model.encoder(batch["patches_a"], batch["coords_a"])
    assert model.identity_head is not None
    expected = identity_loss(model.identity_head(tokens[:, 0]), model.identity_head(target[:, 0]), 4)
    torch.testing.assert_close(losses["identity_loss"], expected)
    parts = losses["pixel_loss"] + losses["feature_loss"] + 0.7 * losses["identity_loss"]
    torch.testing.assert_close(losses["loss"], parts)
    plain = PersonMAE(size="micro")
    plain.load_state_dict({name: t for name, t in model.state_dict().items() if not name.startswith("identity_head.")})
    for name, loss in plain(batch | {"target": target[:, 1:]}).items():
        if name != "loss":
            torch.testing.assert_close(loss, losses[name])
    losses["loss"].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_identity_loss_works_without_the_feature_loss():
    model = a_model(feature_weight=0.0, identity_weight=1.0)
    assert model.needs_teacher
    batch = cut_batch(*a_batch(), SPEC)
    batch["target"] = Teacher(model.encoder, SPEC.grid, class_token=True)(batch["patches_b"])
    losses = model(batch)
    assert list(losses) == ["loss", "pixel_loss", "identity_loss", "target_std"]
    torch.testing.assert_close(losses["loss"], losses["pixel_loss"] + losses["identity_loss"])


def test_the_options_are_off_in_a_model_of_the_paper():
    model = PersonMAE(size="micro")
    assert model.identity_head is None
    assert not model.visible_positions
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"encoder", "pixel_decoder", "feature_decoder"}
    assert not a_model(feature_weight=0.0).needs_teacher


@pytest.mark.parametrize("micro", [2, 8, 32])
def test_how_far_targets_are_spread_does_not_depend_on_the_micro_batch(micro):
    target = torch.randn(64, 32, 128, generator=torch.Generator().manual_seed(0)) * 1.7
    found = torch.stack([spread_over_images(part) for part in target.split(micro)]).mean().item()
    assert found == pytest.approx(spread_over_images(target).item(), rel=5e-3)
    assert found == pytest.approx(1.7, rel=1e-2)


def test_a_collapsed_teacher_has_no_spread_and_one_image_says_nothing():
    same = torch.randn(1, 32, 128, generator=torch.Generator().manual_seed(0)).expand(8, -1, -1)
    assert spread_over_images(same).item() == pytest.approx(0.0, abs=1e-6)
    assert spread_over_images(same[:1]).item() == 0.0
