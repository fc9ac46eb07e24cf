"""Fine-tuning and evaluation on a small synthetic benchmark, through the loaders that read the real ones."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from people import draw_few_people
from programs import environment, launch, one_line_error, personmae

from personmae.__main__ import main
from personmae.checkpoint import portable
from personmae.monitor.rank_metrics import RankMetrics
from personmae.reid.heads import ReIDModel

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both benchmarks, 8 identities each to train and to test on."""
    return draw_few_people(tmp_path_factory.mktemp("synth"))


def arguments(benchmarks: Path, run_dir: Path, *overrides: str) -> list[str]:
    return [
        "configs/quickstart_random.yaml",
        f"root={benchmarks / 'market1501'}",
        f"run_dir={run_dir}",
        "batch.num_ids=4",
        "train.epochs=5",
        "train.log_every=1",
        "train.precision=fp32",
        *overrides,
    ]


def result(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "result.json").read_text())


@pytest.fixture(scope="module")
def finished(benchmarks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    done = personmae("finetune", *arguments(benchmarks, run_dir))
    assert done.returncode == 0, done.stderr
    return run_dir


def test_a_run_ends_with_scores_that_evaluate_repeats(finished: Path, benchmarks: Path, tmp_path: Path) -> None:
    scores = result(finished)
    assert scores["num_queries"] == scores["num_valid"] == 32
    assert scores["num_gallery"] == 8 * 8 + 4
    assert 0 < scores["mINP"] <= 1
    assert 0 < scores["mAP"] <= 1
    assert scores["rank1"] <= scores["rank5"] <= scores["rank10"]
    again = personmae("evaluate", finished, "market1501", benchmarks / "market1501", "--out", tmp_path)
    assert again.returncode == 0, again.stderr
    assert result(tmp_path)["mAP"] == pytest.approx(scores["mAP"], abs=1e-6)
    newest = portable.newest(finished)
    assert newest is not None
    found = result(tmp_path)
    assert [found[key] for key in ("checkpoint", "digest")] == [str(newest), portable.digest(newest)]
    assert found["step"] == portable.step_of(newest.name)
    assert found["trained_on"]["benchmark_digest"] == found["benchmark_digest"]
    assert "zero shot" not in again.stdout + again.stderr
    assert found["camera_pairs"] == scores["camera_pairs"]
    assert sum(map(sum, found["camera_pairs"]["num_queries"])) >= 32


def test_a_run_is_tested_on_another_benchmark_and_the_record_says_what_it_was_trained_on(
    finished: Path, benchmarks: Path, tmp_path: Path
) -> None:
    out = tmp_path / "other"
    done = personmae("evaluate", finished, "occluded_duke", benchmarks / "occluded_duke", "--latency", "--out", out)
    assert done.returncode == 0, done.stderr
    assert "occluded_duke" in next(line for line in done.stdout.splitlines() if " mAP " in line)
    found, own = result(out), result(finished)
    assert found["run"] == str(finished)
    assert found["trained_on"] == {
        "benchmark": "market1501",
        "root": str((benchmarks / "market1501").resolve()),
        **{name: own["identity"][f"data.{name}"] for name in ("num_images", "num_ids", "digest")},
        **{name: own[name] for name in ("benchmark_digest", "benchmark_title")},
        "labels": True,
    }
    assert found["benchmark_digest"] != own["benchmark_digest"]
    assert f"zero shot: run was trained on {own['benchmark_title']}" in done.stdout + done.stderr
    time_of_the_model = found["latency"]
    assert time_of_the_model["img_size"] == [128, 64]
    assert 0 < time_of_the_model["milliseconds"] < 60_000
    assert time_of_the_model["images_per_second"] > 0
    assert time_of_the_model["hardware"]["cores"] == os.cpu_count()
    assert f"run: {time_of_the_model['milliseconds']:.1f} ms an image" in done.stdout


def test_a_stopped_run_ends_with_the_scores_of_an_uninterrupted_one(finished: Path, benchmarks: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = ["-m", "personmae", "finetune", *arguments(benchmarks, run_dir)]
    run = warm.start(command, env=environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    while not (run_dir / "metrics.jsonl").exists() or len((run_dir / "metrics.jsonl").read_text().splitlines()) < 3:
        assert time.monotonic() < deadline
        assert run.poll() is None, run.communicate()[1]
        time.sleep(0.005)
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=60) == 75
    assert "Run this again to go on" in run.communicate()[1]
    assert not (run_dir / "result.json").exists()
    done = personmae("finetune", *arguments(benchmarks, run_dir))
    assert done.returncode == 0, done.stderr
    assert "resuming at step" in done.stdout
    names = ("mAP", "rank1", "mINP")
    assert [result(run_dir)[n] for n in names] == [result(finished)[n] for n in names]


@pytest.mark.slow
def test_two_ranks_end_with_the_weights_of_one(benchmarks: Path, tmp_path: Path) -> None:
    """Mined over the global batch, normalised in the same groups, augmented and dropped alike: sums alone differ."""
    # SGD: AdamW makes whole steps of gradients that are nothing but rounding.
    few = ["train.bn_group_size=8", "train.epochs=2", "optim.kind=sgd", "optim.lr=0.01", "train.drop_path_rate=0.3"]
    options = ["--standalone", "--nproc-per-node", "2", "launcher/finetune.py", "--config"]
    done = launch("torchrun", *options, *arguments(benchmarks, tmp_path / "two", *few))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("mAP") == 1
    alone = personmae("finetune", *arguments(benchmarks, tmp_path / "one", *few))
    assert alone.returncode == 0, alone.stderr
    two, one = (portable.newest(tmp_path / name) for name in ("two", "one"))
    assert two is not None
    assert one is not None
    ours, theirs = portable.read(two).tensors["model"], portable.read(one).tensors["model"]
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=2e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")
    assert result(tmp_path / "two")["mAP"] == pytest.approx(result(tmp_path / "one")["mAP"], abs=0.02)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["root=nowhere/at/all"], "nowhere/at/all"),
        (["init=nowhere/at/all"], "nowhere/at/all does not exist"),
        (["batch.num_ids=9"], "9"),
        (["benchmark=market1502"], "'benchmark'"),
    ],
)
def test_what_cannot_be_trained_on_is_one_line(overrides: list[str], expected: str, benchmarks: Path, tmp_path: Path) -> None:
    line = one_line_error(personmae("finetune", *arguments(benchmarks, tmp_path / "run", *overrides)))
    assert expected in line
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_other_weights_is_refused_by_name(finished: Path, benchmarks: Path, tmp_path: Path) -> None:
    line = one_line_error(personmae("finetune", *arguments(benchmarks, tmp_path / "run", f"init={finished}")))
    assert "a pre-training checkpoint is required" in line


def test_a_result_of_other_settings_is_not_taken_for_this_runs(finished: Path, benchmarks: Path) -> None:
    same = personmae("finetune", *arguments(benchmarks, finished))
    assert same.returncode == 0
    assert "is complete" in same.stdout
    line = one_line_error(personmae("finetune", *arguments(benchmarks, finished, "optim.lr=1e-5")))
    assert "belongs to a run with other settings or data: optim.lr=0.001 (now 1e-05). Use the same" in line


def copied(run_dir: Path, where: Path) -> Path:
    shutil.copytree(run_dir, where)
    return where


def test_a_complete_run_is_known_wherever_its_data_lie_and_however_it_is_watched(finished, benchmarks, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(benchmarks, moved)
    run_dir = copied(finished, tmp_path / "run")
    other = ["train.log_every=7", "checkpoint.keep_last=9", "train.max_skipped_steps=3"]
    done = personmae("finetune", *arguments(moved, run_dir, *other))
    assert done.returncode == 0, done.stderr
    assert f"{run_dir} is complete" in done.stdout


def test_a_result_that_was_cut_off_is_measured_again(finished, benchmarks, tmp_path):
    run_dir = copied(finished, tmp_path / "run")
    text = (run_dir / "result.json").read_text()
    (run_dir / "result.json").write_text(text[: len(text) // 2])
    done = personmae("finetune", *arguments(benchmarks, run_dir))
    assert done.returncode == 0, done.stderr
    assert "extracting 100 images: " in done.stdout
    assert "ranking 32 x 68: " in done.stdout
    assert result(run_dir)["mAP"] == result(finished)["mAP"]


def test_data_that_have_changed_are_named_with_their_counts_and_classes(finished, benchmarks, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(benchmarks, changed)
    train = changed / "market1501" / "bounding_box_train"
    pid = min(path.name for path in train.glob("*.jpg")).split("_")[0]
    gone = list(train.glob(f"{pid}_*.jpg"))
    for path in gone:
        path.unlink()
    run_dir = copied(finished, tmp_path / "run")
    output = f"64 training images of 8 ids (now {64 - len(gone)} of 7), so its head has 8 classes and 7 are required"
    assert output in one_line_error(personmae("finetune", *arguments(changed, run_dir)))
    (run_dir / "result.json").unlink()
    line = one_line_error(personmae("finetune", *arguments(changed, run_dir)))
    assert output in line
    assert "step-" in line


def test_steps_that_are_not_finite_end_the_run_at_the_next_logged_one(benchmarks, tmp_path):
    settings = ["optim.lr=1e30", "train.max_skipped_steps=2"]
    done = personmae("finetune", *arguments(benchmarks, tmp_path / "run", *settings))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "the gradient was not finite in 2 steps in a row, up to step 3" in done.stderr


def test_the_last_step_is_saved_though_it_was_skipped_and_features_that_are_not_finite_are_a_divergence(benchmarks, tmp_path):
    done = personmae("finetune", *arguments(benchmarks, tmp_path / "run", "optim.lr=1e30", "train.max_skipped_steps=999"))
    assert done.returncode == 1, done.stdout + done.stderr
    newest = portable.newest(tmp_path / "run")
    assert newest is not None
    saved = portable.read(newest)
    assert saved.step == saved.state["total_steps"]
    assert all(tensor.isfinite().all() for name, tensor in saved.tensors["model"].items() if "running" in name)
    assert f"features are not finite at step {saved.step}" in done.stderr


def opened_for_writing(pipe: Path, reader: warm.Process) -> int:
    """The file descriptor of a named pipe, once the process reads it."""
    deadline = time.monotonic() + 90
    while True:
        assert reader.poll() is None, reader.communicate()[1]
        assert time.monotonic() < deadline
        with contextlib.suppress(OSError):  # until someone reads it
            number = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
            os.set_blocking(number, True)
            return number
        time.sleep(0.01)


def test_a_run_that_is_stopped_in_its_evaluation_is_measured_when_it_goes_on(finished, benchmarks, tmp_path):
    held = tmp_path / "data"
    shutil.copytree(benchmarks, held)
    image = max((held / "market1501" / "bounding_box_test").glob("*.jpg"))
    content = image.read_bytes()
    image.unlink()
    os.mkfifo(image)  # whoever reads it waits for a writer: so the evaluation is under way when the signal comes
    command = ["-m", "personmae", "finetune", *arguments(held, tmp_path / "run")]
    run = warm.start(command, env=environment(), stderr=subprocess.PIPE, text=True)
    pipe = opened_for_writing(image, run)
    run.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    with open(pipe, "wb") as file:
        file.write(content)
    _, output = run.communicate(timeout=60)
    assert run.returncode == 75, output
    assert "while the gallery was ranked, all" in output
    image.unlink()
    image.write_bytes(content)
    done = personmae("finetune", *arguments(held, tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert result(tmp_path / "run")["mAP"] == result(finished)["mAP"]


def test_pre_trained_weights_alone_cannot_be_evaluated(native_run: Path, benchmarks: Path) -> None:
    line = one_line_error(personmae("evaluate", native_run, "market1501", benchmarks / "market1501"))
    assert "a fine-tuned checkpoint is required" in line


def test_the_first_step_of_a_compiled_run_has_the_time_that_compiling_takes(benchmarks, tmp_path, monkeypatch, restore_signals):
    """An agent ends a rank that is silent for longer than its phase allows; a step's is 300 s."""

    class Enough(Exception):  # noqa: N818 - it ends the run here
        pass

    phases: list[tuple[str, int]] = []

    def beat(_: RankMetrics, phase: str, step: int) -> None:
        phases.append((phase, step))
        if step == 2:
            raise Enough

    monkeypatch.setattr(RankMetrics, "beat", beat)
    monkeypatch.setattr(ReIDModel, "compile", lambda _: None)  # what it takes is not the matter here
    monkeypatch.chdir(Path(__file__).parents[2])
    with contextlib.suppress(Enough):
        main(["finetune", *arguments(benchmarks, tmp_path / "run", "train.compile=true")])
    assert phases == [("compile", 0), ("step", 1), ("step", 2)]
