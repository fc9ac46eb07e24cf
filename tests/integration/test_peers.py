"""The usual way that ours is compared with does the same work: the same losses, gradients, updates and images."""

import importlib
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from programs import ROOT, environment
from torch import Tensor

from personmae import optim
from personmae.engine.native import NativeEngine
from personmae.model.inputs import Draws, RegionSpec, cut_batch
from personmae.model.personmae import PersonMAE
from personmae.model.regions import RegionDraws, region_b_coords
from personmae.model.teacher import Teacher
from personmae.model.vit import grid_coords, patchify, take_tokens
from personmae.precision import native_cpu

pytestmark = pytest.mark.integration

PEERS = ROOT / "benchmarks" / "peers"
SPEC = RegionSpec((128, 64), 16, (0.5, 0.4, 0.6), (0.5, 0.6, 0.4), 32, (0.8, 1.0), (0.375, 0.667), 0.5, "block", 0.75, 4)
LR, WEIGHT_DECAY, BETAS, MOMENTUM = 1e-2, 0.5, (0.9, 0.95), 0.9


def load_peer(name: str) -> Any:
    """A module that lies in the folder of the script and is no package's."""
    sys.path.insert(0, str(PEERS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(PEERS))


@pytest.fixture(scope="module")
def usual() -> Any:
    """The usual way itself."""
    return load_peer("usual")


def new_model() -> PersonMAE:
    """Ours, with no parameter at a value that would hide a mistake, such as a bias of 0."""
    torch.manual_seed(0)
    model = PersonMAE(size="micro")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model


def draw_sample(usual: Any, seed: int, size: int = 6) -> Any:
    """A batch of the usual way: noise, but RegionB as shifted as it says."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(32, generator=generator)[:8].sort()[0] for _ in range(size)])
    region_a, region_b = (torch.randn(size, 3, *SPEC.img_size, generator=generator) for _ in range(2))
    return usual.Sample(region_a, region_b, ids, torch.randint(0, 17, (size, 2), generator=generator))


def as_ours(batch: Any) -> dict[str, Tensor]:
    """The same as the student of ours takes it."""
    patches_a, patches_b = (patchify(region, SPEC.patch_size) for region in (batch.region_a, batch.region_b))
    coords = grid_coords(SPEC.grid)
    return {
        "patches_a": take_tokens(patches_a, batch.ids_keep),
        "coords_a": coords[batch.ids_keep],
        "patches_b": patches_b,
        "coords_b": region_b_coords(coords, batch.shift, SPEC.patch_size),
    }


def new_trainer(usual: Any, model: PersonMAE, dtype: torch.dtype = torch.float32) -> Any:
    """The usual way from our weights."""
    theirs = usual.UsualPersonMAE("micro", SPEC)
    theirs.load_state_dict(model.state_dict())
    return usual.Trainer(theirs, dtype=dtype, betas=BETAS, weight_decay=WEIGHT_DECAY)


def test_losses_and_gradients_are_ours_on_the_same_weights(usual: Any) -> None:
    model, batch = new_model(), draw_sample(usual, seed=1)
    trainer, inputs = new_trainer(usual, model), as_ours(draw_sample(usual, seed=1))
    target = Teacher(model.encoder, SPEC.grid)(inputs["patches_b"])
    ours = model(inputs | {"target": target})
    pixel_loss, feature_loss = trainer.model(*batch, target)
    torch.testing.assert_close(pixel_loss, ours["pixel_loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(feature_loss, ours["feature_loss"], rtol=1e-5, atol=0)
    ours["loss"].backward()
    (pixel_loss + feature_loss).backward()
    theirs = dict(trainer.model.named_parameters())
    assert theirs.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(theirs[name].grad, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def rms(difference: torch.Tensor) -> float:
    """By elements Adam makes whole steps of rounding, where a gradient is nearly nothing."""
    return difference.square().mean().sqrt().item()


def test_four_updates_of_student_and_teacher_come_to_the_same(usual: Any) -> None:
    model = new_model()
    trainer, teacher = new_trainer(usual, model), Teacher(model.encoder, SPEC.grid)
    groups = optim.param_groups(model.named_parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    engine = NativeEngine(model, optim.adamw(groups, BETAS), grad_accum_steps=1, max_norm=None)
    for seed in range(4):
        batch = draw_sample(usual, seed)
        inputs = as_ours(batch)
        losses = engine.forward_backward(inputs | {"target": teacher(inputs["patches_b"])}, last_micro=True)
        grad_norm = engine.step(0.5).grad_norm
        teacher.update(list(model.encoder.parameters()), MOMENTUM)
        assert trainer.step(batch, lr=0.5 * LR, momentum=MOMENTUM) == pytest.approx(float(losses["loss"]), rel=1e-5)
        torch.testing.assert_close(trainer.grad_norm, grad_norm, rtol=1e-4, atol=0)
    for name, parameter in model.named_parameters():
        if not name.endswith("qkv.bias"):  # a key's bias has no gradient but noise, of which Adam makes whole steps
            found = dict(trainer.model.named_parameters())[name]
            assert rms(found - parameter) < LR / 100, name  # the four updates are of 2 LR
    averages = dict(trainer.teacher.named_parameters())
    for name, parameter in teacher.encoder.named_parameters():
        if not name.endswith("qkv.bias"):
            assert rms(averages[name] - parameter) < LR / 200, name


def test_autocast_changes_its_losses_no_more_than_ours(usual: Any) -> None:
    model, batch = new_model(), draw_sample(usual, seed=2)
    inputs = as_ours(batch)
    exact = new_trainer(usual, model).step(batch, lr=0.0, momentum=1.0)
    rounded = new_trainer(usual, model, torch.bfloat16).step(batch, lr=0.0, momentum=1.0)
    model.compute_dtype = torch.bfloat16
    ours = model(inputs | {"target": Teacher(model.encoder, SPEC.grid, torch.bfloat16)(inputs["patches_b"])})["loss"]
    assert rounded == pytest.approx(float(ours.detach()), rel=2e-3)
    assert rounded == pytest.approx(exact, rel=2e-3)
    assert rounded != exact


def test_regions_are_those_that_ours_cuts_for_the_same_draws(usual: Any) -> None:
    rng = np.random.default_rng(0)
    pixels = cv2.resize(rng.integers(0, 256, (24, 12, 3), dtype=np.uint8), (70, 150), interpolation=cv2.INTER_CUBIC)
    box, flip, scale, shift = (7, 3, 130, 60), True, 21, (13, 6)
    theirs = usual.cut(Image.fromarray(pixels), box, flip, scale, shift, SPEC)
    top, left, height, width = box
    boxes = torch.tensor([[top / 150, left / 70, (top + height) / 150, (left + width) / 70]])
    regions = RegionDraws(boxes, torch.tensor([flip]), torch.tensor([scale]), torch.tensor([shift]))
    canvas = torch.zeros(1, *SPEC.canvas_size, 3, dtype=torch.uint8)
    canvas[0, :150, :70] = torch.from_numpy(pixels)
    ours = cut_batch(canvas, torch.tensor([[150, 70]]), Draws(regions, torch.arange(32)[None]), SPEC)
    for region, patches in zip(theirs, (ours["patches_a"], ours["patches_b"]), strict=True):
        levels = (patchify(region[None], SPEC.patch_size) - patches).abs() * 255 * max(SPEC.std)
        assert levels.mean() < 0.5  # PIL rounds to whole grey levels, twice
        assert levels.max() < 3


def test_samples_of_a_folder_are_random_but_whole(usual: Any, images: Path) -> None:
    crops = usual.Crops(images / "more", SPEC)
    assert len(crops) == 10
    samples = [crops[i % 10] for i in range(40)]
    for region_a, region_b, ids_keep, (down, right) in samples:
        assert region_a.shape == region_b.shape == (3, 128, 64)
        assert len(ids_keep) == 8
        assert (ids_keep.diff() > 0).all()
        assert 0 <= down <= 32
        assert 0 <= right <= 16
        torch.testing.assert_close(region_a[:, down:, right:], region_b[:, : 128 - down, : 64 - right])
    assert len({tuple(sample.shift.tolist()) for sample in samples}) > 20
    assert len({tuple(sample.ids_keep.tolist()) for sample in samples}) > 30
    batch = next(iter(usual.load(images / "more", SPEC, 4, 0, pin_memory=False)))
    assert batch.region_a.shape == (4, 3, 128, 64)


def test_an_epoch_has_as_many_batches_as_are_asked_for(usual: Any, images: Path) -> None:
    batches = list(usual.load(images / "more", SPEC, 4, 0, pin_memory=False, num_batches=6))
    assert len(batches) >= 6
    assert {len(batch.region_a) for batch in batches} == {4}


def test_ratios_are_of_the_rounds_that_both_have_done() -> None:
    ours = {"step": [10.0, 20.0], "cut and step": [20.0], "whole": []}
    found = load_peer("compare").ratios({"ours": ours, "usual, bf16": {"step": [30.0, 20.0], "whole": []}})
    assert found == {
        "step": {"usual, bf16": {"lowest": 1.0, "median": 2.0, "highest": 3.0}},
        "cut and step": {"usual, bf16": {"lowest": 1.5, "median": 1.5, "highest": 1.5}},
    }


def test_masks_hide_exactly_so_many_patches_mostly_in_blocks(usual: Any) -> None:
    random.seed(0)
    masks = [usual.draw_mask((16, 8), 96, 4) for _ in range(100)]
    assert {int(mask.sum()) for mask in masks} == {96}
    hidden_pairs = np.mean([(mask[1:] & mask[:-1]).sum() / mask[1:].size for mask in masks])
    assert hidden_pairs > 0.62  # single patches would give 0.75 squared, 0.56
    assert len({mask.tobytes() for mask in masks}) > 90  # a single block of all 96 comes now and then


@pytest.mark.slow
def test_every_way_is_measured_beside_ours(shard_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "peers.json"
    options = ["--batch-size", "8", "--rounds", "2", "--steps", "1", "--out", str(out)]
    command = [sys.executable, str(PEERS / "compare.py"), "--shards", str(shard_dir), *options]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    times, ratios = record["milliseconds"], record["ratios"]
    ways = ["usual, bf16", "usual, fp32"] if native_cpu().bf16 else ["usual, fp32"]
    usual_parts = {way: {"step", "whole"} for way in ways}
    assert {way: set(parts) for way, parts in times.items()} == {"ours": {"step", "cut and step", "whole"}} | usual_parts
    assert record["settings"]["precision"] == native_cpu().best
    assert all(len(rounds) == 2 and min(rounds) > 0 for parts in times.values() for rounds in parts.values())
    per_round = [a / b for a, b in zip(times[ways[0]]["whole"], times["ours"]["whole"], strict=True)]
    assert ratios["whole"][ways[0]]["median"] == pytest.approx(sum(per_round) / 2)
    assert ratios["whole"][ways[0]]["lowest"] == pytest.approx(min(per_round))
    per_round = [a / b for a, b in zip(times["usual, fp32"]["step"], times["ours"]["cut and step"], strict=True)]
    assert ratios["cut and step"]["usual, fp32"]["highest"] == pytest.approx(max(per_round))
    assert record["settings"]["batch_size"] == 8
    assert str(tmp_path.parent) not in out.read_text()
    assert "usual, fp32" in done.stdout
