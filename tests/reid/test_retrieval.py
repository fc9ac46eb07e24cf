"""A search on a benchmark of real files: what the record holds, re-ranked or not."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from personmae.errors import UserError
from personmae.reid import retrieval
from personmae.reid.datasets import Benchmark, Sample

IMG_SIZE = (32, 16)
NUM_PIDS, PER_PID = 6, 5


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Five noisy pictures of each of six patterns, of two cameras in turn."""
    folder, rng = tmp_path_factory.mktemp("people"), np.random.default_rng(0)
    found = []
    for pid in range(NUM_PIDS):
        pattern = rng.integers(0, 256, (8, 4, 3))
        for number in range(PER_PID):
            noisy = np.clip(pattern + rng.normal(0, 40, pattern.shape), 0, 255).astype(np.uint8)
            path = folder / f"{pid}_{number}.png"
            assert cv2.imwrite(str(path), cv2.resize(noisy, IMG_SIZE[::-1], interpolation=cv2.INTER_NEAREST))
            found.append(Sample(str(path), pid, number % 2))
    return found


def benchmark(query: list[Sample], gallery: list[Sample]) -> Benchmark:
    return Benchmark("folder", str(Path(query[0].path).parent), (), tuple(query), tuple(gallery))


def measure(of: Benchmark, **settings) -> dict:
    record = retrieval.measure(of, retrieval.histogram_features, img_size=IMG_SIZE, num_threads=2, **settings)
    assert record
    return record


def split(samples: list[Sample]) -> Benchmark:
    return benchmark(samples[::PER_PID], [s for i, s in enumerate(samples) if i % PER_PID])


def test_the_record_holds_scores_counts_and_rank_lists(samples: list[Sample]):
    record = measure(split(samples))
    assert 0.3 < record["mAP"] <= 1
    assert record["mAP"] >= record["mAP_trapezoid"]
    assert record["rank1"] <= record["rank5"] <= record["rank10"] == 1
    assert (record["num_queries"], record["num_valid"], record["num_gallery"], record["rerank"]) == (6, 6, 24, "none")
    first = record["rank_lists"][0]
    assert first["query"] == samples[0].path
    removed = {s.path for s in samples if s.pid == 0 and s.camid == 0}
    assert not removed & set(first["gallery"])
    assert first["correct"] == [Path(path).name.startswith("0_") for path in first["gallery"]]


@pytest.mark.parametrize("rerank", ["aqe", "k_reciprocal"])
def test_re_ranking_changes_scores_and_lists_alike(samples: list[Sample], rerank: str):
    plain, other = measure(split(samples)), measure(split(samples), rerank=rerank)
    assert other["rerank"] == rerank
    assert plain["mAP"] != other["mAP"]
    assert plain["rank_lists"] != other["rank_lists"]
    first_right = [entry["correct"][0] for entry in other["rank_lists"]]
    assert other["rank1"] == pytest.approx(sum(first_right) / len(first_right))


def test_without_cameras_the_query_does_not_find_itself(samples: list[Sample]):
    unknown = [Sample(s.path, s.pid, -1) for s in samples]
    record = measure(benchmark(unknown, unknown))
    assert (record["num_valid"], record["num_gallery"]) == (30, 30)
    assert record["rank1"] < 1  # the picture itself would be right for everyone
    assert all(entry["query"] not in entry["gallery"] for entry in record["rank_lists"])
    by_another = measure(benchmark(unknown[::PER_PID], [s for i, s in enumerate(unknown) if i % PER_PID]))
    assert sum(by_another["rank_lists"][0]["correct"]) == PER_PID - 1


def test_the_device_may_be_named(samples: list[Sample]):
    named = measure(split(samples), device=torch.device("cpu"))
    assert named["mAP"] == measure(split(samples))["mAP"]


def test_an_unknown_re_ranking_is_refused(samples: list[Sample]):
    with pytest.raises(UserError, match="rerank must be one of none, aqe, k_reciprocal; got 'magic'"):
        measure(split(samples), rerank="magic")
