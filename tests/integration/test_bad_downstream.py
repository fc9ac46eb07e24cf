"""Weights, data and places that fine-tuning, unsupervised training and evaluation cannot work with: each ends in one line."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from on_disk import write_checkpoint
from people import FEW_CLUSTERS, draw_few_people
from programs import ROOT, environment, launch, one_line_error, personmae

from personmae.checkpoint import portable

pytestmark = pytest.mark.integration
TINY = ["batch.num_ids=4", "train.epochs=1", "train.precision=fp32"]
CLUSTERS = [*FEW_CLUSTERS, "train.iters_per_epoch=2"]


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A benchmark of 8 identities to train and to test on."""
    return draw_few_people(tmp_path_factory.mktemp("synth")) / "market1501"


@pytest.fixture(scope="module")
def tuned(market: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short fine-tuning on that benchmark."""
    run_dir = tmp_path_factory.mktemp("tuned") / "run"
    done = personmae("finetune", *finetuning(market, run_dir))
    assert done.returncode == 0, done.stderr
    return run_dir


def finetuning(root: Path, run_dir: Path, *overrides: str) -> list[str]:
    return ["configs/quickstart_random.yaml", f"root={root}", f"run_dir={run_dir}", *TINY, *overrides]


def learning(root: Path, init: Path, run_dir: Path, *overrides: str) -> list[str]:
    start = ["configs/quickstart_usl.yaml", f"root={root}", f"init={init}", f"run_dir={run_dir}"]
    return [*start, *TINY, *CLUSTERS, "train.bn_group_size=8", *overrides]


def copied(root: Path, where: Path) -> Path:
    shutil.copytree(root, where)
    return where


def test_a_fine_tuning_that_has_not_reached_its_end_is_no_start_for_adaptation(market, tuned, tmp_path):
    path = portable.newest(tuned)
    assert path is not None
    saved = portable.read(path)
    saved.state["total_steps"] = 99
    written = write_checkpoint(tmp_path / "early", saved, keep_last=1)
    line = one_line_error(personmae("unsupervised", *learning(market, tmp_path / "early", tmp_path / "run")))
    assert f"must be a finished run and is at step {saved.step} of 99" in line
    assert f"or name the checkpoint itself: {written}" in line


def test_a_start_that_has_seen_the_labels_is_told_with_what_matches(market, tuned, tmp_path):
    done = personmae("unsupervised", *learning(market, tuned, tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("warning: ") == 1
    assert "and has seen these labels" in done.stdout
    assert f"of {tuned} match. The head starts new: " in done.stdout
    for work in ("opening", "extracting", "clustering"):
        assert f"{work} 64 images" in done.stdout


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.mean=[0.4,0.4,0.4]"], "Give model.mean=[0.5,0.5,0.5] or leave it out"),
        (["cluster.min_samples=60"], "Raise cluster.eps=0.3"),
        (["cluster.eps=0.99", "cluster.k1=60", "cluster.k2=20"], "Lower cluster.eps=0.99"),
        (["train.bn_group_size=5"], "1 rank. Give another train.bn_group_size such as 2 or 4 (only"),
    ],
)
def test_unsupervised_training_says_what_to_change(market, tuned, tmp_path, overrides, expected):
    assert expected in one_line_error(personmae("unsupervised", *learning(market, tuned, tmp_path / "run", *overrides)))


def test_fine_tuning_from_a_fine_tuned_model_is_refused_with_a_way_out(market, tuned, tmp_path):
    line = one_line_error(personmae("finetune", *finetuning(market, tmp_path / "run", f"init={tuned}")))
    assert "a pre-training checkpoint is required" in line
    assert "give init the run that it came from" in line


def test_a_plan_is_offered_by_pre_training_alone(market, tmp_path):
    line = one_line_error(personmae("finetune", *finetuning(market, tmp_path / "run"), "--dry-run", "2"))
    assert "--dry-run" in line
    assert "--dry-run" not in personmae("unsupervised", "--help").stdout
    assert "--dry-run" in personmae("pretrain", "--help").stdout


def test_an_image_that_is_cut_short_is_named_before_the_first_step(market, tmp_path):
    root = copied(market, tmp_path / "data")
    cut = min((root / "bounding_box_train").glob("*.jpg"))
    cut.write_bytes(cut.read_bytes()[:-40])
    line = one_line_error(personmae("finetune", *finetuning(root, tmp_path / "run")))
    assert f"{cut} is not a whole image: it ends early" in line


@pytest.mark.slow
def test_an_image_that_the_second_rank_alone_reads_is_named(market, tmp_path):
    root = copied(market, tmp_path / "data")
    bad = max((root / "bounding_box_test").glob("*.jpg"))
    bad.write_bytes(b"not an image")
    options = ["--standalone", "--nproc-per-node", "2", "launcher/finetune.py", "--config"]
    done = launch("torchrun", *options, *finetuning(root, tmp_path / "run", "train.bn_group_size=8"))
    assert done.returncode != 0
    assert f"error: {bad} is not a whole image" in done.stderr


def test_histogram_takes_no_pooling(market):
    line = one_line_error(personmae("evaluate", "histogram", "market1501", market, "--pool", "mean"))
    assert "'histogram' has no tokens: leave it out" in line


def test_a_place_that_takes_no_result_is_told_before_anything_is_computed(market, tuned, tmp_path):
    (tmp_path / "file").write_text("")
    done = personmae("evaluate", tuned, "market1501", market, "--out", tmp_path / "file" / "below")
    assert "there is a file where a directory is needed" in one_line_error(done)
    assert "extracting" not in done.stdout


def test_an_evaluation_needs_no_training_images(market, tmp_path):
    root = copied(market, tmp_path / "data")
    shutil.rmtree(root / "bounding_box_train")
    done = personmae("evaluate", "histogram", "market1501", root)
    assert done.returncode == 0, done.stderr
    assert "mAP" in done.stdout.splitlines()[-1]
    assert "train " not in done.stdout


FIRST_RANK = """
import sys
from personmae import dist, errors
from personmae.errors import Unavailable, UserError, leave, run_program

def work():
    if sys.argv[1] == "user":
        raise UserError("only the first rank sees this")
    if sys.argv[1] == "away":
        raise Unavailable("only the first rank sees this")
    return "done"

def program():
    world = dist.read_world()
    dist.start(world)
    found = dist.on_first_rank(work)
    assert found == ("done" if world.is_first else None)
    dist.barrier()
    dist.stop()

import os
errors.FIRST_RANK_SECONDS = 0.1  # nothing ends these
code = run_program(program, quiet=os.environ["RANK"] != "0")
print(f"rank {os.environ['RANK']} ends with {code}", flush=True)
leave(0)  # as our programs do: a rank that shuts its interpreter down may die of SIGABRT, which torchrun shows as a traceback
"""


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [("user", 78), ("away", 1), ("well", 0)])
def test_all_ranks_end_alike_when_the_first_alone_has_failed(tmp_path, how, code):
    (tmp_path / "ranks.py").write_text(FIRST_RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", tmp_path / "ranks.py", how]
    env = environment({"PYTHONPATH": str(ROOT)})
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, check=False)
    assert [f"rank {rank} ends with {code}" in done.stdout for rank in (0, 1)] == [True, True], done.stdout + done.stderr
    assert done.stderr.count("only the first rank sees this") == (how != "well")
    assert "Traceback" not in done.stderr


LATE_FIRST_RANK = """
import os, sys, time
from personmae import errors

def program():
    time.sleep(4 if os.environ["RANK"] == "0" else 0)
    raise errors.UserError("all ranks see this")

errors.leave(errors.run_program(program, quiet=os.environ["RANK"] != "0"))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [("deepspeed", "--num_gpus=2", "--master_port=29617"), ("torchrun", "--standalone", "--nproc-per-node=2")]
)
def test_what_all_ranks_have_seen_is_said_also_where_the_first_comes_late(tmp_path, launcher):
    (tmp_path / "ranks.py").write_text(LATE_FIRST_RANK)
    done = launch(*launcher, str(tmp_path / "ranks.py"))
    assert (done.stdout + done.stderr).count("error: all ranks see this") == 1, done.stdout + done.stderr
