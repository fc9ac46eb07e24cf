"""File names that are no UTF-8, as old disks have them: training, evaluation and messages live with them."""

import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from personmae.__main__ import main
from personmae.reid import datasets

NAME = os.fsdecode(b"caf\xe9")  # in Latin-1
SMALL = ["model.img_size=[64,32]", "train.precision=fp32", "batch.num_ids=4", "batch.num_instances=4"]


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An own data set, each folder and file of which has such a name."""
    root, rng = tmp_path_factory.mktemp("people"), np.random.default_rng(0)
    for split, pids, number in (("train", "bcdf", 4), ("query", "ae", 1), ("gallery", "ae", 4)):
        for pid in pids:
            base = rng.integers(0, 256, (8, 4, 3))
            folder = root / split / f"{pid}{NAME}"
            folder.mkdir(parents=True)
            for camera in range(number):
                noisy = np.clip(base + rng.normal(0, 10, base.shape), 0, 255).astype(np.uint8)
                png = cv2.imencode(".png", cv2.resize(noisy, (32, 64)))[1].tobytes()
                (folder / f"{NAME}_c{camera + 1 + 5 * (split == 'query')}.png").write_bytes(png)
    return root


@pytest.fixture(scope="module")
def run(people: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of fine-tuning on it."""
    run_dir = tmp_path_factory.mktemp("finetuned") / "run"
    settings = ["benchmark=folder", f"root={people}", f"run_dir={run_dir}", "model.size=micro", "head.kind=bnneck"]
    settings += ["init=random", "train.epochs=2", "train.bn_group_size=16", *SMALL]
    assert main(["finetune", "configs/finetune_market1501.yaml", *settings]) == 0
    return run_dir


def listed(folder: Path, root: Path) -> None:
    """All images of the rank lists are there."""
    lists = json.loads((folder / "rank_lists.json").read_text(encoding="utf-8"))
    paths = [path for entry in lists["entries"] for path in (entry["query"], *entry["gallery"])]
    assert len(paths) == 2 * (1 + 8)
    assert all(NAME in path and (root / path).is_file() for path in paths)


def test_fine_tuning_ends_with_rank_lists_whose_images_can_be_opened(people, run):
    listed(run, people)
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    assert result["benchmark_digest"] == datasets.digest(datasets.load_benchmark("folder", people))


def test_an_evaluation_of_it_and_training_without_labels_do_too(people, run, tmp_path, capsys):
    assert main(["evaluate", str(run), "folder", str(people), "--out", str(tmp_path / "out")]) == 0
    listed(tmp_path / "out", people)
    digests = [json.loads((folder / "result.json").read_text())["benchmark_digest"] for folder in (run, tmp_path / "out")]
    assert digests[0] == digests[1]  # training images were read for the first alone
    assert "zero shot" not in capsys.readouterr().err
    settings = ["benchmark=folder", f"root={people}", f"run_dir={tmp_path / 'usl'}", f"init={run}", *SMALL]
    settings += ["cluster.k1=4", "cluster.k2=2", "cluster.min_samples=2", "train.epochs=1", "train.iters_per_epoch=2"]
    assert main(["unsupervised", "configs/quickstart_usl.yaml", *settings]) == 0
    listed(tmp_path / "usl", people)
    assert main(["doctor", "--data", str(people)]) == 0
    assert "every file opens as an image" in capsys.readouterr().out


def test_an_evaluation_of_a_run_that_recorded_the_earlier_digest_is_not_called_zero_shot(people, run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    earlier = datasets.earlier_digest(datasets.load_benchmark("folder", people))
    assert earlier != result["benchmark_digest"]
    (tmp_path / "run" / "result.json").write_text(json.dumps(result | {"benchmark_digest": earlier}))
    assert main(["evaluate", str(tmp_path / "run"), "folder", str(people), "--out", str(tmp_path / "out")]) == 0
    assert "zero shot" not in capsys.readouterr().err
    evaluated = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
    assert evaluated["trained_on"]["benchmark_digest"] == result["benchmark_digest"]


def test_an_image_with_such_a_name_that_cannot_be_read_is_named_by_evaluation_and_doctor(people, run, tmp_path, capsys):
    victim = next((people / "query").glob("*/*"))
    content = victim.read_bytes()
    victim.write_bytes(content[:-20])
    try:
        for command in (["evaluate", str(run), "folder", str(people)], ["doctor", "--data", str(people)]):
            assert main(command) == 78
            assert r"caf\udce9_c6.png" in capsys.readouterr().err.splitlines()[-1]
    finally:
        victim.write_bytes(content)
