"""One image has one feature, whichever way it is asked for."""

import json
from pathlib import Path

import pytest
import small_runs
import torch
import torch.nn.functional as F
from people import draw_few_people
from small_runs import personmae
from torch import Tensor

import personmae as package
from personmae import evaluate, images
from personmae.reid import retrieval
from personmae.reid.datasets import load_benchmark
from personmae.weights import export_onnx, extract, feature_file
from personmae.weights.export_check import run_timm
from personmae.weights.pixels import to_pixels


def evaluated(run: Path, root: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The features that ``personmae evaluate`` ranks, of query and gallery."""
    seen: list[Tensor] = []
    rank_all = retrieval.rank_all

    def watched(benchmark, vectors, **options):
        seen.append(vectors)
        return rank_all(benchmark, vectors, **options)

    with monkeypatch.context() as patched:
        patched.setattr(retrieval, "rank_all", watched)
        evaluate.run(str(run), "market1501", str(root), out=out)
    assert json.loads((out / "result.json").read_text())["mAP"] > 0
    (vectors,) = seen
    return vectors


def test_load_extract_evaluate_onnx_and_timm_give_one_feature(tmp_path, monkeypatch, restore_signals):
    pytest.importorskip("onnxruntime", reason="personmae[export] is not installed")
    run, root = small_runs.make(tmp_path / "run", "neck"), draw_few_people(tmp_path) / "market1501"
    benchmark = load_benchmark("market1501", str(root), splits=("query", "gallery"))
    paths = [Path(sample.path) for sample in (*benchmark.query, *benchmark.gallery)]
    found = {"evaluate": evaluated(run, root, tmp_path / "evaluated", monkeypatch)}
    encoder = package.load(run, device="cpu")
    found["load, from paths"] = encoder.features(paths)
    pixels = [images.decode(path.read_bytes()).pixels for path in paths]
    found["load, from pixels"] = encoder.features(pixels)
    (tmp_path / "list.txt").write_text("\n".join(map(str, paths)))
    extract.run(str(tmp_path / "list.txt"), tmp_path / "f.parquet", model=str(run), num_processes=1)
    rows = feature_file.read(tmp_path / "f.parquet")
    assert rows.ids == [str(path) for path in paths]
    found["extract"] = torch.tensor(rows.features)
    result = personmae("export", run, tmp_path / "out", "--formats", "timm,onnx")
    assert result.returncode == 0, result.stderr
    found["the exported folder"] = package.load(tmp_path / "out", device="cpu").features(paths)
    normalised = torch.stack([encoder.preprocess(path) for path in paths])
    found["timm"] = F.normalize(run_timm(tmp_path / "out" / "timm")(normalised), dim=1)
    unit = torch.stack([torch.from_numpy(to_pixels(path, encoder.config["size"])) for path in paths]).float() / 255
    found["ONNX"] = export_onnx.runner(tmp_path / "out" / "onnx" / "unit.onnx")(unit)
    for name, features in found.items():
        torch.testing.assert_close(
            features, found["evaluate"], rtol=1e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert found["evaluate"].std(dim=0).max() > 1e-4
