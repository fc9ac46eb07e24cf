"""Positions in MAE's order of axes, and checkpoints from before: permuted where they are read, exactly."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from closeness import assert_close
from older import MICRO, make_old, positions_of_before, y_first
from on_disk import write_checkpoint
from safetensors.torch import load_file
from torch import Tensor, nn

from personmae import evaluate
from personmae.checkpoint import portable
from personmae.checkpoint.portable import Checkpoint
from personmae.errors import UserError
from personmae.model.personmae import PersonMAE
from personmae.model.positions import x_first
from personmae.model.teacher import Teacher
from personmae.model.vit import SIZES, VisionTransformer, grid_coords, patchify, sincos_embedding
from personmae.reid.heads import ReIDModel, build_head, encoder_weights


def mae_table(dim: int, grid: tuple[int, int]) -> np.ndarray:
    """MAE's table for a grid (h, w), in float64 from its text: "here w goes first"."""
    omega = 1.0 / 10000 ** (np.arange(dim // 4) / (dim / 4))
    across, down = np.meshgrid(np.arange(grid[1]), np.arange(grid[0]))
    halves = [np.outer(axis.ravel(), omega) for axis in (across, down)]
    return np.concatenate([part for half in halves for part in (np.sin(half), np.cos(half))], axis=1)


def randomised(module: nn.Module) -> nn.Module:
    """With no parameter at a value that would hide a mistake."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor += 0.02 * torch.randn(tensor.shape, generator=generator).abs()
    return module


@pytest.mark.parametrize(("dim", "grid"), [(128, (8, 4)), (384, (16, 8)), (768, (14, 14))])
def test_positions_are_maes(dim: int, grid: tuple[int, int]) -> None:
    table = sincos_embedding(grid_coords(grid), dim)
    torch.testing.assert_close(table, torch.from_numpy(mae_table(dim, grid)).float(), rtol=0, atol=5e-6)
    halves = torch.cat(y_first(grid_coords(grid), dim).chunk(2, dim=1)[::-1], dim=1)
    torch.testing.assert_close(table, halves, rtol=0, atol=5e-6)


def test_permuted_weights_give_the_tokens_of_before_up_to_the_order_of_channels() -> None:
    old = randomised(VisionTransformer(**SIZES["micro"])).eval()
    images = torch.randn(3, 3, 128, 64, generator=torch.Generator().manual_seed(1))
    inputs = patchify(images, 16), grid_coords((8, 4)).expand(3, -1, -1)
    with positions_of_before():
        expected = old(*inputs)
    new = VisionTransformer(**SIZES["micro"]).eval()
    new.load_state_dict(x_first(old.state_dict(), MICRO))
    swapped = torch.cat(new(*inputs).chunk(2, dim=-1)[::-1], dim=-1)
    torch.testing.assert_close(swapped, expected, rtol=0, atol=1e-5)
    assert (old(*inputs) - expected).abs().max() > 0.1  # unpermuted it sees wrong places


def batch_of(model: PersonMAE) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    coords = grid_coords((8, 4)).expand(4, -1, -1)
    a, b = (torch.randn(4, 32, 768, generator=generator) for _ in range(2))
    return {"patches_a": a[:, :8], "coords_a": coords[:, 3:11], "patches_b": b, "coords_b": coords + 0.375}


@pytest.mark.parametrize("options", [{}, {"pixel_dim": 64, "feature_dim": 192, "visible_positions": True}])
def test_permuted_weights_and_moments_train_on_as_before(options: dict[str, Any]) -> None:
    """Losses and three updates of AdamW from given moments, with decoders of other widths than the encoder's."""
    torch.manual_seed(0)
    old = randomised(PersonMAE(size="micro", **options))
    new = PersonMAE(size="micro", **options)
    new.load_state_dict(x_first(old.state_dict(), MICRO))
    generator = torch.Generator().manual_seed(3)
    moments = {name: 1e-3 * torch.rand(p.shape, generator=generator) for name, p in old.named_parameters()}

    def train(model: nn.Module, moments: dict[str, Tensor]) -> list[float]:
        assert isinstance(model, PersonMAE)
        optimizer, batch, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), batch_of(model), []
        teacher = Teacher(model.encoder, (8, 4))
        for name, parameter in model.named_parameters():
            state = {"step": torch.tensor(5.0), "exp_avg": moments[name].clone(), "exp_avg_sq": moments[name] ** 2}
            optimizer.state[parameter] = state
        for _ in range(3):
            loss = model(batch | {"target": teacher(batch["patches_b"])})["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    with positions_of_before():
        expected = train(old, moments)
    assert_close(train(new, x_first(moments, MICRO)), expected, rel=1e-5)
    # and the weights at the end are the same, up to the permutation, which is its own inverse
    back = x_first(new.state_dict(), MICRO)
    for name, tensor in old.state_dict().items():
        if not name.endswith("qkv.bias"):  # a key's bias has no gradient but noise, of which Adam makes whole steps
            torch.testing.assert_close(back[name], tensor, rtol=1e-3, atol=2e-5, msg=name)


HEADS = [
    {"kind": "mgn", "embed_dim": 32},
    {"kind": "bnneck", "pool": "cls_mean"},
    {"kind": "bnneck", "pool": "cls"},
    {"kind": "neck", "pool": "mean"},
    {"kind": "neck", "pool": "cls_mean"},
]


@pytest.mark.parametrize("head", HEADS, ids=lambda head: "-".join(map(str, head.values())))
def test_a_fine_tuned_model_of_before_ranks_as_it_did(head: dict[str, Any], tmp_path: Path) -> None:
    encoder = VisionTransformer(**SIZES["micro"])
    old = randomised(ReIDModel(encoder, build_head(encoder, 5, **head), trained_size=(128, 64))).eval()
    assert isinstance(old, ReIDModel)
    tensors = {f"model.{name}": tensor for name, tensor in old.state_dict().items()}
    path = written_before(tmp_path, {"model": tensors}, {"head": head, "num_classes": 5})
    new = evaluate.load_model(portable.read(path), path)
    images = torch.randn(4, 3, 128, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        with positions_of_before():
            before, scores = old.features(images), old(images)["logits"]
        after = new.features(images)
        torch.testing.assert_close(after @ after.T, before @ before.T, rtol=0, atol=1e-5)
        torch.testing.assert_close(new(images)["logits"], scores, rtol=1e-4, atol=1e-4)
    # what a domain adaptation starts from is an encoder in the new order too
    wanted = x_first(encoder_weights(dict(old.state_dict())), MICRO)
    found = encoder_weights({n.removeprefix("model."): t for n, t in portable.read_kind(path, "model").items()})
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def written_before(run_dir: Path, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> Path:
    """A checkpoint as they were written."""
    saved = Checkpoint(1, tensors, {"total_steps": 1, "model": MICRO} | state)
    return make_old(write_checkpoint(run_dir, saved, keep_last=1))


def test_centroids_of_clusters_go_with_the_features(tmp_path: Path) -> None:
    centroids = torch.arange(3 * 256.0).reshape(3, 256)  # the class token, then the mean
    clusters = {"centroids": centroids, "labels": torch.tensor([0, 1, 2, -1])}
    found = portable.read(written_before(tmp_path, {"clusters": clusters}, {})).tensors["clusters"]
    swapped = torch.cat([centroids[:, 64:128], centroids[:, :64], centroids[:, 192:], centroids[:, 128:192]], dim=1)
    assert torch.equal(found["centroids"], swapped)
    assert torch.equal(found["labels"], clusters["labels"])


def test_a_checkpoint_of_today_is_read_as_it_is_and_one_of_tomorrow_is_refused(tmp_path: Path) -> None:
    model = PersonMAE(size="micro")
    path = write_checkpoint(tmp_path, Checkpoint(1, {"student": dict(model.state_dict())}, {"model": MICRO}), keep_last=1)
    for name, tensor in portable.read_kind(path, "student").items():
        assert torch.equal(tensor, model.state_dict()[name])
    assert (path / portable.STATE).read_text().count('"format": 2') == 1
    record = json.loads((path / portable.STATE).read_bytes()) | {"format": 3}
    (path / portable.STATE).write_text(json.dumps(record))
    for read in (portable.read, lambda where: portable.read_kind(where, "student")):
        with pytest.raises(UserError, match=r"format 2 or less can be read, this one has format 3. Update personmae"):
            read(path)


def test_every_tensor_of_a_stream_is_permuted_and_no_other() -> None:
    model = PersonMAE(size="micro", pixel_dim=64)
    before = {name: torch.arange(t.numel(), dtype=torch.float64).reshape(t.shape) for name, t in model.state_dict().items()}
    after = x_first(before, MICRO)
    kept = {name for name in before if torch.equal(after[name], before[name])}
    assert kept == {name for name in before if name.endswith(("qkv.bias", "fc1.bias")) or name == "pixel_decoder.head.bias"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in x_first(after, MICRO).items())


def test_parts_of_ranks_are_joined_before_they_are_permuted(tmp_path: Path) -> None:
    model = PersonMAE(size="micro")
    path = written_before(tmp_path, {"student": dict(model.state_dict())}, {})
    raw = load_file(path / "student.safetensors")
    expected = x_first(raw, MICRO)
    encoder, settings = portable.read_encoder(path)
    assert settings == MICRO
    assert encoder.keys() == {name.removeprefix("encoder.") for name in raw if name.startswith("encoder.")}
    assert all(torch.equal(t, expected[f"encoder.{name}"]) for name, t in encoder.items())
