"""The report on a tiny real pre-training run with hand-made results beside it."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from made_runs import DRAWN

from personmae import config, pretrain
from personmae.__main__ import main
from personmae.checkpoint import portable
from personmae.data import importer
from personmae.data.decode import decode_onto
from personmae.data.order import sample_keys
from personmae.errors import Unavailable, UserError
from personmae.explain import reconstruction
from personmae.model.inputs import RegionSpec, cut_batch, draw_batch
from personmae.model.personmae import PersonMAE
from personmae.model.vit import patchify
from personmae.report import figures, report

SCORES = {"mAP": 0.4321, "rank1": 0.5, "rank5": 0.7, "rank10": 0.8, "mINP": 0.1, "cmc": [0.5, 0.7, 0.8]}
COUNTS = {"num_queries": 4, "num_valid": 4, "num_gallery": 20, "seconds": 1.5, "commit": None}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with images, shards and a pre-training run of three steps."""
    root = tmp_path_factory.mktemp("report")
    _write_images(root / "images", 12)
    importer.write(root / "images", str(root / "shards"))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    pretrain.run(_settings(root))
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return root


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    """The pre-training run, two fine-tunings and a baseline, in one directory."""
    shutil.copytree(trained / "runs" / "pretrain", tmp_path / "pretrain")
    _write_result(tmp_path / "finetune_random", trained, init="random", mAP=0.3)
    _write_result(tmp_path / "finetune_personmae", trained, init=str(tmp_path / "pretrain"))
    _write_result(tmp_path / "histogram", trained, init="colour alone", mAP=0.0987)
    for name, init in (("finetune_random", "random"), ("finetune_personmae", "pretrain")):
        _write_finetuning(tmp_path / name, init)
    return tmp_path


def _settings(root: Path) -> config.Pretrain:
    return config.Pretrain.model_validate(
        {
            "run_dir": str(root / "runs" / "pretrain"),
            "data": {"shards": str(root / "shards"), "num_threads": 1},
            "model": {"size": "micro", "img_size": (64, 32)},
            "decoders": {"depth": 1},
            "regions": {"max_shift": 16},
            "train": {"global_batch_size": 4, "total_steps": 3, "log_every": 1, "precision": "fp32", "compile": False},
            "engine": {"name": "native"},
        }
    )


def _write_images(folder: Path, count: int) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = rng.integers(0, 256, (8, 4, 3), np.uint8)
        cv2.imwrite(str(folder / f"{i:02}.jpg"), cv2.resize(coarse, (40, 80), interpolation=cv2.INTER_CUBIC))


def _write_result(folder: Path, root: Path, **fields: object) -> None:
    folder.mkdir()
    result = SCORES | COUNTS | DRAWN | {"name": folder.name, "benchmark": "market1501", "root": str(root / "gone")} | fields
    (folder / "result.json").write_text(json.dumps(result))
    entries = [
        {"query": f"{q:02}.jpg", "gallery": [f"{g:02}.jpg" for g in range(2, 12)], "correct": [g == q + 2 for g in range(10)]}
        for q in range(4)
    ]
    (folder / "rank_lists.json").write_text(json.dumps({"root": str(root / "images"), "entries": entries}))


def _write_finetuning(folder: Path, init: str) -> None:
    settings = config.Finetune.model_validate({"run_dir": str(folder), "root": "somewhere", "init": init})
    (folder / "config.yaml").write_text(config.dump_yaml(settings))
    hardware = {"cpu": "a <processor>", "cores": 2, "memory_bytes": 2**33, "gpus": ["GPU-9000"]}
    info = {"command": ["finetune"], "config_hash": "c0ffee", "seed": 7, "commit": None, "versions": {"torch": "9.9"}}
    (folder / "run.json").write_text(json.dumps(info | {"hardware": hardware}))
    records = [{"step": s, "loss": 5.0 - s, "accuracy": s / 4, "images_per_second": 9.0} for s in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in records))


def test_the_page_holds_everything_and_links_to_nothing(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = report.run(runs)
    text = page.read_text()
    addresses = re.findall(r'(?:src|href)="([^#"]*)"', text)
    assert len(addresses) == 8 * 5 + 4 * 2 * 11 + 1  # groups, rank lists, the map of what masks hide
    assert all(address.startswith("data:image/") for address in addresses)
    assert text.count("<svg") == 5 + 1  # curves of training, and CMC
    assert re.findall(r"url\((?!#)", text) == []
    assert "@import" not in text
    for expected in (
        "43.2",
        "30.0",
        "9.9",
        "13.2 points more",
        "uses the target's own patch statistics",
        "RegionB, the target",
        "How often each patch of RegionA is hidden, the darker the more often: the middle ",
        "floor of the pixel loss: positions alone: ",
    ):
        assert expected in text
    assert "<strong>43.2</strong>" in text
    assert "differ: init (pretrain / random)" in text
    assert "12 images in 1 shard," in text
    assert "as they were at the evaluation" in text
    for setting in ("max_shift: 16", "GPU-9000", "a &lt;processor&gt;", "c0ffee", "torch 9.9"):
        assert setting in text
    printed = capsys.readouterr().out
    assert str(page) in printed.splitlines()
    assert printed.splitlines()[-1].startswith("next: ")
    assert "43.2" in printed


def test_the_figure_is_1200_pixels_wide(runs: Path) -> None:
    report.run(runs)
    figure = cv2.imread(str(runs / "figure.png"))
    assert figure is not None
    assert figure.shape[1] == 1200
    assert (figure.reshape(-1, 3) == figures.GREEN[::-1]).all(axis=1).any()  # BGR


def test_a_run_directory_itself_can_be_reported(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "runs" / "pretrain", tmp_path / "pretrain")
    text = report.run(tmp_path / "pretrain").read_text()
    assert "pretrain is at step 3" in text
    assert "no run has a rank_lists.json yet" in text


def test_a_run_without_labels_has_its_row_and_its_curve(runs: Path, trained: Path) -> None:
    folder = runs / "usl"
    _write_result(folder, trained, init=str(runs / "pretrain"), mAP=0.1234)
    _write_finetuning(folder, "pretrain")
    settings = config.Unsupervised.model_validate(
        {"run_dir": str(folder), "root": "somewhere", "init": "pretrain", "train": {"epochs": 1, "iters_per_epoch": 2}}
    )
    (folder / "config.yaml").write_text(config.dump_yaml(settings))
    text = report.run(runs).read_text()
    assert "12.3" in text
    assert "without labels: loss" in text


def _write_clusters(folder: Path, **scores: float) -> None:
    lines = [{"epoch": e, "step": 2 * e, "num_clusters": 50 + e, "num_outliers": 9 - e, **scores} for e in (0, 1)]
    (folder / "clusters.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


@pytest.fixture
def usl(runs: Path, trained: Path) -> Path:
    """A run without labels beside the others."""
    folder = runs / "usl"
    _write_result(folder, trained, init=str(runs / "pretrain"), mAP=0.1234, whiten={"dim": 64, "shrinkage": 0.3})
    _write_finetuning(folder, "pretrain")
    settings = config.Unsupervised.model_validate({"run_dir": str(folder), "root": "somewhere", "init": "pretrain"})
    (folder / "config.yaml").write_text(config.dump_yaml(settings))
    return folder


def test_clusters_are_drawn_with_what_they_share_with_people_and_cameras(runs: Path, usl: Path) -> None:
    _write_clusters(usl, ami_people=0.2, pair_precision=0.3, recall_across_cameras=0.4, ami_cameras=0.1, one_camera_share=0.05)
    text = report.run(runs).read_text()
    for words in ("num_clusters", "NMI, not adjusted"):
        assert words not in text
    for words in ("clusters: 50 at 0 to 51 at 2", "in none: 9 at 0 to 8 at 2"):
        assert words in text
    for words in ("Chart of clusters and people", "pair precision: 0.3 at 0", "recall across cameras: 0.4 at 0"):
        assert words in text
    for words in ("Chart of clusters and cameras", "clusters of one camera: 0.05 at 0"):
        assert words in text
    assert "clusters follow cameras" not in text
    assert "features whitened per camera" in text


def test_a_page_warns_where_clusters_follow_cameras(runs: Path, usl: Path) -> None:
    _write_clusters(usl, ami_cameras=0.4, one_camera_share=0.8)
    assert '<li class="warn">clusters follow cameras</li>' in report.run(runs).read_text()


def test_a_run_of_an_older_version_shows_the_score_it_had(runs: Path, usl: Path) -> None:
    _write_clusters(usl, nmi=0.7, ari=0.01)
    text = report.run(runs).read_text()
    assert "Chart of clusters and people" in text
    assert "NMI, not adjusted for chance: 0.7 at 0" in text
    assert "clusters and cameras" not in text


def test_clusters_that_are_no_json_are_named(runs: Path, usl: Path) -> None:
    (usl / "clusters.jsonl").write_text("{epoch\n")
    with pytest.raises(UserError, match=r"clusters\.jsonl of .*usl must be JSON"):
        report.run(runs)


def test_what_is_missing_is_left_out_with_a_reason(runs: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(runs / "pretrain" / "checkpoints")
    (runs / "pretrain" / "config.yaml").write_text(
        (runs / "pretrain" / "config.yaml").read_text().replace(str(trained / "shards"), "nowhere")
    )
    (runs / "finetune_random" / "result.json").unlink()
    lists = runs / "finetune_personmae" / "rank_lists.json"
    lists.write_text(lists.read_text().replace(str(trained / "images"), "moved"))
    assert main(["report", str(runs)]) == 1
    text = (runs / "report.html").read_text(encoding="utf-8")
    assert "has no checkpoint yet" in text
    assert re.search("Not counted: nowhere is needed by .*pretrain and is not there", text)
    assert re.search("left out: 00.jpg is needed by .*finetune_personmae and is not there", text)
    assert "There is no pair to compare yet" in text
    output = capsys.readouterr().err.splitlines()
    assert [line.split(" is ")[0] for line in output] == ["left out: 00.jpg", "left out: nowhere", "incomplete: the page"]


def test_a_checkpoint_that_cannot_be_read_leaves_its_figure_out(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (runs / "pretrain" / "checkpoints").glob("step-*/student*"):
        path.write_bytes(b"damaged")
    assert main(["report", str(runs)]) == 1
    assert "This part is left out: " in (runs / "report.html").read_text(encoding="utf-8")
    assert "left out: " in capsys.readouterr().err


@pytest.mark.parametrize("kind", [UserError, Unavailable, OSError])
def test_what_fails_leaves_out_its_part_alone(kind: type[Exception]) -> None:
    def build() -> str:
        raise kind("gone")

    assert report.attempt(build) == report.Section(missing="gone", lost=True)


def test_what_is_not_there_yet_is_no_failure(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(runs / "pretrain" / "checkpoints")
    for path in runs.glob("*/rank_lists.json"):
        path.unlink()
    assert main(["report", str(runs)]) == 0
    assert capsys.readouterr().err == ""


def test_a_report_from_another_folder_has_all_figures(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every path in the runs is relative to the folder they were started in."""
    work = tmp_path / "near"
    shutil.copytree(trained, work)
    _write_result(work / "runs" / "finetune_random", Path(), init="random")
    for path in (work / "runs").glob("*/*.*"):
        path.write_bytes(path.read_bytes().replace(f"{trained}/".encode(), b""))
    (work / "shards" / "synthetic.json").write_text("{}")
    lists = work / "runs" / "finetune_random" / "rank_lists.json"
    assert json.loads(lists.read_bytes())["root"] == "images"
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert main(["report", "../near/runs"]) == 0
    text = (work / "runs" / "report.html").read_text(encoding="utf-8")
    assert text.count("<img ") == 8 * 5 + 4 * 11 + 1
    assert "The people are synthetic." in text
    assert "12 images in 1 shard," in text
    assert "left out" not in text + "".join(capsys.readouterr())


def test_names_that_are_no_utf8_survive(runs: Path, trained: Path, tmp_path: Path) -> None:
    odd = os.fsdecode(b"caf\xe9")
    copied = tmp_path / odd
    shutil.copytree(trained / "images", copied)
    for name in ("rank_lists.json", "result.json"):
        path = runs / "finetune_personmae" / name
        record = json.loads(path.read_bytes())
        path.write_text(json.dumps(record | ({"root": str(copied)} if "entries" in record else {"name": odd})))
    (runs / "histogram").rename(runs / f"{odd}_histogram")
    assert main(["report", str(runs)]) == 0
    text = (runs / "report.html").read_text(encoding="utf-8")
    assert '<th scope="row">caf\ufffd' in text
    assert text.count("<img ") == 8 * 5 + 4 * 2 * 11 + 1


def test_a_baseline_alone_makes_a_page(runs: Path) -> None:
    text = report.run(runs / "histogram").read_text()
    assert "There is no pre-training run here" in text
    assert "No run here has logged a step yet" in text
    assert "9.9" in text


def test_a_directory_with_nothing_to_report_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds neither"):
        report.run(tmp_path)
    with pytest.raises(UserError, match="absent does not exist"):
        report.run(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is not a directory"):
        report.run(tmp_path / "file")


def test_a_damaged_result_is_named(runs: Path) -> None:
    (runs / "histogram" / "result.json").write_text('{"name": "histogram"}')
    with pytest.raises(UserError, match=r"histogram/result\.json .* init: Field required"):
        report.run(runs)


def test_the_masked_image_hides_exactly_the_hidden_patches(trained: Path) -> None:
    settings = _settings(trained)
    spec = RegionSpec(**settings.region_arguments())
    drawn = figures.reconstruct_run(settings, Path(settings.run_dir), 8)
    ids = np.linspace(0, 11, 8).astype(np.int64)
    draws = draw_batch(torch.from_numpy(sample_keys(ids, seed=0, epoch=0)), torch.full((8, 2), 40) * torch.tensor([2, 1]), spec)
    differs = (drawn.masked != drawn.region_a).any(dim=-1)  # (B, H, W)
    grey = (drawn.masked == reconstruction.GREY).all(dim=-1)
    hidden = reconstruction.hidden_mask(draws.ids_keep, spec.grid).reshape(8, 4, 2)
    hidden = hidden.repeat_interleave(16, dim=1).repeat_interleave(16, dim=2)
    assert hidden.float().mean() == 0.75
    assert torch.equal(grey, hidden)
    assert not (differs & ~hidden).any()


def test_images_of_a_run_are_predicted_by_the_whole_model_of_its_configuration(trained: Path) -> None:
    settings = _settings(trained)
    spec, model = RegionSpec(**settings.region_arguments()), PersonMAE(**settings.model_arguments())
    path = portable.newest(settings.run_dir)
    assert path
    portable.load_strictly(model, portable.read(path).tensors["student"], path)
    height, width = spec.canvas_size
    canvas, ids = np.zeros((8, height, width, 3), np.uint8), np.linspace(0, 11, 8).astype(np.int64)
    with figures.open_shards(settings, Path(settings.run_dir)) as shards:
        placed = [decode_onto(shards.jpeg(int(i)), row) for i, row in zip(ids, canvas, strict=True)]
    native, size = (torch.tensor(sizes) for sizes in zip(*placed, strict=True))
    draws = draw_batch(torch.from_numpy(sample_keys(ids, seed=0, epoch=0)), native, spec)
    expected = reconstruction.reconstruct_batch(model, torch.from_numpy(canvas), size, draws, spec)
    for ours, theirs in zip(figures.reconstruct_run(settings, Path(settings.run_dir), 8), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_a_run_is_drawn_with_the_normalisation_that_its_weights_came_with(trained: Path) -> None:
    """That of another project's encoder is in the checkpoint and not in the configuration."""
    settings, directory = _settings(trained), _settings(trained).run_dir
    model = settings.model.model_copy(update={"mean": (0.1, 0.2, 0.3), "std": (0.9, 0.8, 0.7)})
    other = settings.model_copy(update={"model": model})
    both = [figures.reconstruct_run(one, Path(directory), 2) for one in (settings, other)]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*both, strict=True))


def test_predictions_equal_a_patch_by_patch_computation(trained: Path) -> None:
    settings = _settings(trained)
    spec = RegionSpec(**settings.region_arguments())
    model = PersonMAE(**settings.model_arguments())
    path = portable.newest(settings.run_dir)
    assert path
    portable.load_strictly(model, portable.read(path).tensors["student"], path)
    height, width = spec.canvas_size
    generator = torch.Generator().manual_seed(1)
    canvas = torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8, generator=generator)
    size = torch.tensor([[80, 40], [70, 50]])
    draws = draw_batch(torch.tensor([5, 6]), size, spec)
    drawn = reconstruction.reconstruct_batch(model, canvas, size, draws, spec)

    batch = cut_batch(canvas, size, draws, spec)
    with torch.no_grad():
        pred = model.predict_pixels(batch)
    for b in range(2):
        visible = batch["patches_a"][b]
        for name, images in (("target", drawn.with_target_stats), ("visible", drawn.with_visible_stats)):
            got = patchify(images[b : b + 1].permute(0, 3, 1, 2).float(), 16)[0]
            for patch in range(8):
                source = batch["patches_b"][b, patch] if name == "target" else visible
                wanted = pred[b, patch] * source.std() + source.mean()
                wanted = ((wanted * 0.5 + 0.5) * 255).clamp(0, 255)
                assert (got[patch] - wanted).abs().max() <= 0.51


def test_a_report_is_the_same_twice(runs: Path) -> None:
    first = report.run(runs).read_bytes()
    assert report.run(runs).read_bytes() == first


def test_a_frame_says_right_and_wrong_without_touching_its_image() -> None:
    image = np.full((64, 32, 3), 200, np.uint8)
    right, wrong = figures.framed(image, True), figures.framed(image, False)
    assert (image == 200).all()
    assert tuple(right[0, 0]) == figures.GREEN
    assert tuple(wrong[-1, 0]) == figures.RED
    assert (right[10:-10, 10:-10] == 200).all()


def test_a_probe_of_frozen_features_has_a_table_of_its_own(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Frozen features" not in report.run(runs).read_text()
    found = {"rows": {"mAP": 0.1234, "rank1": 0.2}, "lda": {"mAP": 0.236, "rank1": 0.4}}
    init = "runs/pretrain, frozen, rows whitened per camera"
    _write_result(runs / "probe", runs, name="pretrain, rows", init=init, mAP=0.1234, probe=found)
    records = runs / "pretrain" / "metrics.jsonl"
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    lines[-1] |= {"probe_rows_map": 0.1, "probe_lda_map": 0.2}
    records.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    text = report.run(runs).read_text()
    assert "Frozen features, mAP / Rank-1 %" in text
    for cell in ("12.3 / 20.0", "23.6 / 40.0"):
        assert f'<td class="number">{cell}</td>' in text
    assert '<td class="wide">runs/pretrain</td>' in text
    assert "pre-training: mAP of frozen rows" in text
    assert "pretrain, frozen, mAP / Rank-1 %: rows 12.3 / 20.0, LDA 23.6" in capsys.readouterr().out


def test_a_map_is_the_darker_the_larger_the_share() -> None:
    drawn = figures.draw_map(torch.tensor([[0.0, 1.0], [0.5, 0.25]]), cell=8)
    assert drawn.shape == (16, 16, 3)
    assert [int(drawn[y, x, 0]) for y, x in ((4, 4), (4, 12), (12, 4), (12, 12))] == [255, 0, 128, 191]
