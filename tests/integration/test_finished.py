"""What a finished run needs, and what an unfinished one is not taken for; a fine-tuning whose checkpoints cannot be used."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from on_disk import write_checkpoint
from people import FEW_CLUSTERS, draw_few_people

from personmae.__main__ import main
from personmae.checkpoint import portable

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]
TINY = ["batch.num_ids=4", "train.epochs=1", "train.precision=fp32", "model.img_size=[64,32]"]
CLUSTERS = [*FEW_CLUSTERS, "train.iters_per_epoch=2"]


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, restore_signals: None) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A benchmark of 8 identities to train and to test on."""
    return draw_few_people(tmp_path_factory.mktemp("synth")) / "market1501"


def finetune(root: Path, run_dir: Path, *overrides: str) -> int:
    config = str(ROOT / "configs/quickstart_random.yaml")
    return main(["finetune", config, f"root={root}", f"run_dir={run_dir}", *TINY, *overrides])


def unsupervised(root: Path, init: Path, run_dir: Path, *overrides: str) -> int:
    config = str(ROOT / "configs/quickstart_usl.yaml")
    start = ["unsupervised", config, f"root={root}", f"init={init}", f"run_dir={run_dir}", "train.bn_group_size=8"]
    return main([*start, *TINY, *CLUSTERS, *overrides])


@pytest.fixture(scope="module")
def tuned(market: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short fine-tuning."""
    run_dir = tmp_path_factory.mktemp("tuned") / "run"
    assert finetune(market, run_dir) == 0
    return run_dir


@pytest.fixture
def run_dir(tuned: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(tuned, tmp_path / "tuned"))


def error_line(captured: Any) -> str:
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in captured.err
    return line


def delete_moments(run_dir: Path) -> None:
    gone = [path for path in portable.folder(run_dir).rglob("*.safetensors") if portable.is_moments(path.name)]
    assert gone
    for path in gone:
        path.unlink()


def test_a_finished_run_without_its_moments_is_evaluated_started_from_reported_and_complete(market, run_dir, tmp_path, capsys):
    delete_moments(run_dir)
    assert main(["evaluate", str(run_dir), "market1501", str(market), "--out", str(tmp_path / "scores")]) == 0
    scores = [json.loads((where / "result.json").read_bytes())["mAP"] for where in (run_dir, tmp_path / "scores")]
    assert scores[1] == pytest.approx(scores[0], abs=1e-6)
    capsys.readouterr()
    assert finetune(market, run_dir) == 0
    assert f"{run_dir} is complete" in capsys.readouterr().out
    assert unsupervised(market, run_dir, tmp_path / "adapted") == 0
    (run_dir / "result.json").unlink()  # as where it was stopped in its evaluation: that alone is done again
    assert finetune(market, run_dir) == 0
    assert json.loads((run_dir / "result.json").read_bytes())["mAP"] == pytest.approx(scores[0], abs=1e-6)


def test_moments_that_are_damaged_are_damage(market, run_dir, capsys):
    newest = portable.newest(run_dir)
    assert newest is not None
    moments = next(path for path in newest.iterdir() if portable.is_moments(path.name))
    moments.write_bytes(moments.read_bytes()[:-1])
    assert main(["evaluate", str(run_dir), "market1501", str(market)]) == 78
    assert f"{moments.name} does not have the size and hash" in error_line(capsys.readouterr())


def test_a_fine_tuning_whose_checkpoints_are_damaged_does_not_start_anew(market, run_dir, capsys):
    (run_dir / "result.json").unlink()
    newest = portable.newest(run_dir)
    assert newest is not None
    (newest / "model.safetensors").write_bytes(b"")
    before = {path: path.read_bytes() for path in portable.folder(run_dir).rglob("*") if path.is_file()}
    assert finetune(market, run_dir) == 78
    line = error_line(capsys.readouterr())
    assert f"{newest}: model.safetensors does not have" in line
    assert "checkpoint.resume=none" in line
    assert before == {path: path.read_bytes() for path in portable.folder(run_dir).rglob("*") if path.is_file()}


@pytest.fixture
def early(run_dir: Path, tmp_path: Path) -> Path:
    """A run that has more steps before it."""
    newest = portable.newest(run_dir)
    assert newest is not None
    saved = portable.read(newest)
    saved.state["total_steps"] = 99
    return write_checkpoint(tmp_path / "early", saved, keep_last=1).parents[1]


def test_an_unfinished_run_is_evaluated_only_where_that_is_asked_for(market, early, tmp_path, capsys):
    arguments = ["evaluate", str(early), "market1501", str(market), "--out", str(tmp_path / "scores")]
    assert main(arguments) == 78
    line = error_line(capsys.readouterr())
    assert f"{early} must be a finished run and is at step " in line
    assert "of 99" in line
    assert "--unfinished" in line
    assert not (tmp_path / "scores" / "result.json").exists()
    newest = portable.newest(early)
    for asked in ([*arguments, "--unfinished"], ["evaluate", str(newest), *arguments[2:]]):
        assert main(asked) == 0
        assert "whose run is not finished: it is at step " in capsys.readouterr().out
        assert json.loads((tmp_path / "scores" / "result.json").read_bytes())["unfinished"].endswith(" of 99")
        shutil.rmtree(tmp_path / "scores")


def test_a_finished_run_is_not_called_unfinished(market, run_dir, tmp_path, capsys):
    assert main(["evaluate", str(run_dir), "market1501", str(market), "--out", str(tmp_path / "scores")]) == 0
    assert "not finished" not in capsys.readouterr().out
    assert "unfinished" not in json.loads((tmp_path / "scores" / "result.json").read_bytes())


def test_an_unfinished_run_is_no_start_for_adaptation(market, early, tmp_path, capsys):
    assert unsupervised(market, early, tmp_path / "adapted") == 78
    assert f"{early} must be a finished run" in error_line(capsys.readouterr())


def test_an_adaptation_whose_checkpoints_are_damaged_does_not_start_anew(market, run_dir, tmp_path, capsys):
    assert unsupervised(market, run_dir, tmp_path / "adapted") == 0
    (tmp_path / "adapted" / "result.json").unlink()
    newest = portable.newest(tmp_path / "adapted")
    assert newest is not None
    (newest / "clusters.safetensors").unlink()
    capsys.readouterr()
    assert unsupervised(market, run_dir, tmp_path / "adapted") == 78
    assert f"{newest}: clusters.safetensors is missing" in error_line(capsys.readouterr())
