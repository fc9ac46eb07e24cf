"""What an epoch of unsupervised training learns from: features as compared, the memory, and what is said of clusters."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from closeness import assert_allclose

from personmae import clustering, config, unsupervised
from personmae.errors import UserError
from personmae.reid.cluster_quality import ClusterQuality
from personmae.reid.datasets import Benchmark, Sample
from personmae.reid.memory import CameraMemory
from personmae.reid.rows import whiten_per_camera

FOLLOWING = ClusterQuality(60, 5, ami_cameras=0.42, one_camera_share=0.8)


def settings(**sections: dict[str, Any]) -> config.Unsupervised:
    return config.Unsupervised.model_validate({"run_dir": "out", "root": "data", "init": "start"} | sections)


def benchmark(camids: list[int]) -> Benchmark:
    samples = tuple(Sample(f"{i}.jpg", pid=i // 2, camid=camid) for i, camid in enumerate(camids))
    return Benchmark("folder", "data", samples, (), ())


def crowd() -> tuple[torch.Tensor, np.ndarray]:
    """Features with a cast for each of three cameras."""
    draw = torch.Generator().manual_seed(0)
    camids = np.arange(90) % 3
    return torch.randn(90, 12, generator=draw) + 4 * torch.randn(3, 12, generator=draw)[camids], camids


@pytest.mark.parametrize("per_camera", ["none", "standardise", "whiten"])
def test_features_are_compared_as_per_camera_says(per_camera):
    features, camids = crowd()
    options = settings(cluster={"per_camera": per_camera, "whiten_dim": 5, "whiten_shrinkage": 0.2}).cluster
    found = clustering.as_compared(features, camids, options)
    if per_camera == "none":
        mine = features.double().numpy()
        assert_allclose(found.numpy(), mine / np.linalg.norm(mine, axis=1, keepdims=True), atol=1e-6)
    elif per_camera == "whiten":
        assert torch.equal(found, whiten_per_camera(features, camids, dim=5, shrinkage=0.2))
        assert found.shape == (90, 5)
    else:
        mine = features.double().numpy()[camids == 1]
        mine = (mine - mine.mean(axis=0)) / mine.std(axis=0)
        assert_allclose(found.numpy()[camids == 1], mine / np.linalg.norm(mine, axis=1, keepdims=True), atol=1e-5)


@pytest.mark.parametrize("kind", ["cluster", "camera"])
def test_a_memory_out_of_a_checkpoint_is_the_one_that_was_saved(kind):
    labels, camids = np.array([0, 0, 1, 1, -1, 1]), np.array([1, 2, 1, 2, 1, 2])
    options = settings(
        memory={"kind": kind, "momentum": 0.4, "temperature": 0.3, "inter_weight": 0.7, "num_negatives": 1}
    ).memory
    targets = torch.from_numpy(clustering.memory_targets(labels, camids, options))
    assert targets.tolist() == ([0, 0, 1, 1, -1, 1] if kind == "cluster" else [0, 1, 2, 3, -1, 3])
    features = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    centroids = torch.nn.functional.normalize(features[: int(targets.max()) + 1], dim=1)
    first = clustering.build_memory(centroids, labels, camids, options)
    assert isinstance(first, CameraMemory) == (kind == "camera")
    kept = targets >= 0
    first.update(features[kept], targets[kept])
    again = clustering.build_memory(first.centroids.clone(), labels, camids, options)
    loss = first.loss(features[kept], targets[kept])
    assert torch.isfinite(loss)
    assert torch.equal(again.loss(features[kept], targets[kept]), loss)


@pytest.mark.parametrize(
    ("sections", "option"),
    [
        ({"cluster": {"drop_one_camera": True}}, "cluster.drop_one_camera=true"),
        ({"memory": {"kind": "camera"}}, "memory.kind=camera"),
    ],
)
@pytest.mark.parametrize("camids", [[3, 3, 3, 3], [-1, -1, 2, 2]])
def test_what_needs_cameras_is_refused_without_two(sections, option, camids):
    with pytest.raises(UserError, match=rf"{option} needs training images of two cameras or more, and data names 1"):
        clustering.require_cameras(settings(**sections), benchmark(camids))
    clustering.require_cameras(settings(), benchmark(camids))
    clustering.require_cameras(settings(**sections), benchmark([1, 2, 1, 2]))


@dataclass
class Log:
    """Keeps what is logged."""

    lines: list[str] = field(default_factory=list)

    def log(self, line: str) -> None:
        self.lines.append(line)


@dataclass
class Known:
    settings: config.Unsupervised
    step: int = 40


def output(tmp_path: Path, scores: ClusterQuality, **sections: dict[str, Any]) -> list[str]:
    log = Log()
    known: Any = Known(settings(**sections).model_copy(update={"run_dir": str(tmp_path)}))
    clustering._record(known, 1, scores, log)  # pyright: ignore[reportArgumentType] - it only speaks
    return log.lines


def test_scores_are_said_and_written_and_those_that_are_not_known_left_out(tmp_path):
    assert output(tmp_path, ClusterQuality(60, 5, pair_precision=0.25)) == [
        "epoch 1: num_clusters 60  num_outliers 5  pair_precision 0.25"
    ]
    record = json.loads((tmp_path / "clusters.jsonl").read_text())
    assert record == {"epoch": 1, "step": 40, "num_clusters": 60, "num_outliers": 5, "pair_precision": 0.25}


@pytest.mark.parametrize(
    ("sections", "change"),
    [
        ({}, "Set cluster.per_camera=whiten"),
        ({"cluster": {"per_camera": "standardise"}}, "Set cluster.per_camera=whiten"),
        ({"cluster": {"per_camera": "whiten"}}, "Set feature.pool=rows"),
        ({"cluster": {"per_camera": "whiten"}, "feature": {"pool": "rows"}}, "Start from a better encoder"),
    ],
)
def test_a_warning_says_that_clusters_follow_cameras_and_what_to_set(tmp_path, sections, change):
    _, warning = output(tmp_path, FOLLOWING, **sections)
    assert warning.startswith("warning: clusters follow cameras: 80% of them are of one camera")
    assert f"is 0.42. {change}" in warning


def test_too_few_clusters_are_refused():
    with pytest.raises(UserError, match=r"epoch 2 has 3 with 1 of 6 images in none. Lower cluster\.eps"):
        clustering._require_enough(np.array([0, 0, 1, 2, -1, 2]), 2, settings(batch={"num_ids": 4}))
    with pytest.raises(UserError, match=r"has 0 with 6 of 6 images in none. Raise cluster\.eps"):
        clustering._require_enough(np.full(6, -1), 0, settings(batch={"num_ids": 1}))
    clustering._require_enough(np.array([0, 0, 1, 2, -1, 3]), 2, settings(batch={"num_ids": 4}))


def test_the_rate_is_cut_by_epochs_or_falls_along_a_cosine():
    train = {"epochs": 4, "iters_per_epoch": 5}
    cut = settings(train=train, optim={"decay_every_epochs": 2, "decay": 0.1})
    assert [unsupervised.lr_scale_at(cut, step) for step in (0, 9, 10, 19)] == pytest.approx([1, 1, 0.1, 0.1])
    cosine = settings(train=train, optim={"schedule": "cosine"})
    found = [unsupervised.lr_scale_at(cosine, step) for step in range(20)]
    assert found == pytest.approx([0.5 * (1 + math.cos(math.pi * step / 20)) for step in range(20)])


@pytest.mark.parametrize(("kind", "made"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_the_optimizer_is_the_chosen_one(kind, made):
    options = settings(optim={"kind": kind, "lr": 0.003, "momentum": 0.8, "betas": (0.7, 0.8), "weight_decay": 0.2})
    module: Any = torch.nn.Linear(3, 2)
    optimizer = unsupervised.build_engine(options, module).optimizer
    assert isinstance(optimizer, made)
    groups = optimizer.param_groups
    assert {group["lr"] for group in groups} == {0.003}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.2}
    assert groups[0]["momentum"] == 0.8 if kind == "sgd" else groups[0]["betas"] == (0.7, 0.8)
