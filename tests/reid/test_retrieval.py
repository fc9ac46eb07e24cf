"""A search on a benchmark of real files: what the record holds, re-ranked or not."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from closeness import assert_allclose

from personmae.errors import Stopped, UserError
from personmae.reid import ranking, retrieval
from personmae.reid.datasets import Benchmark, Sample, resume_key
from personmae.reid.rows import whiten_per_camera
from personmae.reid.transforms import ImageSet

IMG_SIZE = (32, 16)
NUM_PIDS, PER_PID = 6, 5


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Five noisy images of each of six patterns, of two cameras in turn."""
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
    record = retrieval.measure(of, retrieval.baseline_features("histogram"), img_size=IMG_SIZE, num_threads=2, **settings)
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
    assert record["counts"] == {"query": [6, 6], "gallery": [24, 6]}
    assert (record["synthetic"], record["benchmark_title"]) == (False, "own data, 6 identities")
    assert len(record["benchmark_digest"]) == 16
    assert retrieval.table_row({**record, "name": "run"}).endswith("  own data, 6 identities")
    assert "Market" not in retrieval.table_row({**record, "name": "run", "benchmark_title": "Market-1501"})
    first = record["rank_lists"][0]
    assert first["query"] == samples[0].path
    removed = {s.path for s in samples if s.pid == 0 and s.camid == 0}
    assert not removed & set(first["gallery"])
    assert first["correct"] == [Path(path).name.startswith("0_") for path in first["gallery"]]


def test_camera_pairs_are_recorded_and_compare_no_image_again(samples: list[Sample], monkeypatch: pytest.MonkeyPatch):
    asked: list[int] = []

    def counted(query: torch.Tensor, gallery: torch.Tensor) -> ranking.Similarity:
        compared = ranking.cosine(query, gallery)
        return lambda queries: asked.append(len(queries)) or compared(queries)

    monkeypatch.setitem(retrieval.RERANKINGS, "none", counted)
    record = measure(split(samples))
    assert asked == [6, 6]  # the queries once for the scores, once for the rank lists
    pairs = record["camera_pairs"]
    assert (pairs["query_cameras"], pairs["gallery_cameras"]) == ([0], [0, 1])
    assert pairs["num_queries"] == [[0, 6]]
    for name in ("mAP", "rank1"):
        assert pairs[name] == [[None, pytest.approx(record[name], abs=1e-6)]]


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
    assert record["rank1"] < 1  # the image itself would be right for everyone
    assert all(entry["query"] not in entry["gallery"] for entry in record["rank_lists"])
    by_another = measure(benchmark(unknown[::PER_PID], [s for i, s in enumerate(unknown) if i % PER_PID]))
    assert sum(by_another["rank_lists"][0]["correct"]) == PER_PID - 1


def test_the_device_may_be_named(samples: list[Sample]):
    named = measure(split(samples), device=torch.device("cpu"))
    assert named["mAP"] == measure(split(samples))["mAP"]


def test_an_unknown_re_ranking_is_refused(samples: list[Sample]):
    with pytest.raises(UserError, match=r"rerank must be one of none, aqe, k_reciprocal\. Got 'magic'"):
        measure(split(samples), rerank="magic")


def test_long_works_are_told_with_counts_and_seconds(samples: list[Sample]):
    said: list[str] = []
    measure(split(samples), log=said.append)
    assert said[0::2] == ["extracting 30 images ...", "ranking 6 x 24 ..."]
    assert said[1].startswith("extracting 30 images: ")
    assert said[3].endswith(" s")


def test_a_ranking_can_be_stopped(samples: list[Sample]):
    with pytest.raises(Stopped, match="while the gallery was ranked"):
        measure(split(samples), stopped=lambda: True)


def test_a_record_is_whole_or_absent(samples: list[Sample], tmp_path: Path):
    record = measure(split(samples)) | {"identity": {"seed": 0}}
    retrieval.write_record(tmp_path, record)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["queries.json", "rank_lists.json", "result.json"]
    by_query = [ap for ap in json.loads((tmp_path / "queries.json").read_bytes())["ap"] if ap is not None]
    assert len(by_query) == record["num_valid"]
    assert sum(by_query) / len(by_query) == pytest.approx(record["mAP"], abs=1e-5)
    read = retrieval.read_record(tmp_path)
    assert read is not None
    assert read["cmc"][0] == record["rank1"]
    assert (read["mAP"], read["identity"]) == (record["mAP"], {"seed": 0})
    text = (tmp_path / "result.json").read_text()
    for broken in (text[: len(text) // 2], "", "[]"):
        (tmp_path / "result.json").write_text(broken)
        assert retrieval.read_record(tmp_path) is None
    assert retrieval.read_record(tmp_path / "nowhere") is None


def test_a_record_leads_to_its_images_from_any_folder(samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = Path(samples[0].path).parent
    monkeypatch.chdir(root.parent)
    here = [replace(s, path=f"{root.name}/{Path(s.path).name}") for s in samples]
    retrieval.write_record(tmp_path, measure(replace(split(here), root=root.name)))
    lists, result = (json.loads((tmp_path / name).read_bytes()) for name in ("rank_lists.json", "result.json"))
    assert lists["root"] == result["root"] == str(root)
    entry = lists["entries"][0]
    assert all((Path(lists["root"]) / path).is_file() for path in (entry["query"], *entry["gallery"]))
    assert entry["query"] == Path(samples[0].path).name


def test_an_interrupted_writing_leaves_the_earlier_record(samples: list[Sample], tmp_path: Path):
    record = measure(split(samples))
    retrieval.write_record(tmp_path, record)
    before = (tmp_path / "result.json").read_text()
    with pytest.raises(TypeError):
        retrieval.write_record(tmp_path, record | {"mAP": object()})  # JSON cannot hold it
    assert (tmp_path / "result.json").read_text() == before
    assert json.loads(before)["mAP"] == record["mAP"]


def trained_on(samples: list[Sample]) -> Benchmark:
    return replace(split(samples), train=tuple(samples))


def test_the_identity_of_data_is_paths_classes_and_cameras_and_not_where_they_lie(samples: list[Sample]):
    plain = resume_key(trained_on(samples))
    assert (plain["data.num_images"], plain["data.num_ids"]) == (30, 6)
    root = str(Path(samples[0].path).parent)
    moved = [replace(s, path=s.path.replace(root, "/elsewhere"), pid=10 * s.pid) for s in samples]
    assert resume_key(replace(trained_on(moved), root="/elsewhere")) == plain
    for changed in ({"pid": 3}, {"camid": 5}, {"path": f"{root}/other.png"}):
        assert resume_key(trained_on([replace(samples[0], **changed), *samples[1:]]))["data.digest"] != plain["data.digest"]


def test_what_differs_is_named_with_data_in_counts_and_classes(samples: list[Sample]):
    before = {"head.kind": "mgn", "optim.lr": 0.1} | resume_key(trained_on(samples))
    retrieval.require_same("a/checkpoint", before, before)
    now = before | {"optim.lr": 0.2} | resume_key(trained_on(samples[: 4 * PER_PID]))
    output = (
        r"a/checkpoint belongs to a run with other settings or data: optim\.lr=0\.1 \(now 0\.2\), 30 training images of 6 "
        r"ids \(now 20 of 4\), so its head has 6 classes and 4 are required. Use the same, another run_dir"
    )
    with pytest.raises(UserError, match=output):
        retrieval.require_same("a/checkpoint", now, before)
    renamed = before | resume_key(trained_on([replace(samples[0], camid=9), *samples[1:]]))
    with pytest.raises(UserError, match="30 training images of 6 ids, as now, but with other names, ids or cameras"):
        retrieval.require_same("a/checkpoint", renamed, before)


def standardised(features: np.ndarray, camids: np.ndarray) -> np.ndarray:
    """Of length one, by the definition: each camera's mean and deviation taken out of every channel."""
    found = np.zeros_like(features)
    for camid in set(camids.tolist()):
        own = features[camids == camid]
        found[camids == camid] = (own - own.mean(0)) / np.maximum(own.std(0), 1e-6)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def test_a_baseline_of_two_parts_gives_each_half_of_the_cosine(samples: list[Sample]):
    camids = np.array([sample.camid for sample in samples])
    with ThreadPoolExecutor(1) as pool:
        images = ImageSet([sample.path for sample in samples], IMG_SIZE, pool=pool)
        cosines = []
        for name in ("thumbnail", "histogram", "thumbnail+histogram"):
            parts = [part(images).double().numpy() for part in retrieval.BASELINES[name]]
            expected = np.mean([standardised(part, camids) @ standardised(part, camids).T for part in parts], axis=0)
            unit = torch.nn.functional.normalize(retrieval.baseline_features(name)(images, camids).double(), dim=1)
            assert_allclose(unit @ unit.T, expected, atol=1e-5)
            cosines.append(expected)
    assert_allclose(cosines[2], (cosines[0] + cosines[1]) / 2, atol=1e-12)


def test_features_are_compared_as_they_are_standardised_or_whitened(samples: list[Sample]):
    """Each camera adds its own offset, which is all that is seen until it is taken out."""
    rng = np.random.default_rng(0)
    people, offsets = rng.standard_normal((NUM_PIDS, 8)), 50 * rng.standard_normal((2, 8))
    of = split(samples)
    seen = [people[s.pid] + offsets[s.camid] + 0.1 * rng.standard_normal(8) for s in (*of.query, *of.gallery)]

    def features(*_: object) -> torch.Tensor:
        return torch.tensor(np.stack(seen), dtype=torch.float32)

    found = {}
    for how in ("none", "standardise", "whiten"):
        changed = retrieval.for_each_camera(features, how)
        record = retrieval.measure(of, changed, img_size=IMG_SIZE, num_threads=1)
        assert record
        found[how] = record["mAP"]
    assert found["none"] < 0.6 < 0.95 < min(found["standardise"], found["whiten"])


def test_whitened_features_are_those_of_query_and_gallery_together(samples: list[Sample]):
    camids = np.array([sample.camid for sample in samples])
    drawn = torch.randn(len(samples), 9, generator=torch.Generator().manual_seed(0))
    features = retrieval.for_each_camera(lambda _images, _camids: drawn, "whiten", dim=4, shrinkage=0.2)
    with ThreadPoolExecutor(1) as pool:
        images = ImageSet([sample.path for sample in samples], IMG_SIZE, pool=pool, cache_bytes=0)
        found = features(images, camids)
    assert torch.equal(found, whiten_per_camera(drawn, camids, dim=4, shrinkage=0.2))
    assert found.shape == (len(samples), 4)
