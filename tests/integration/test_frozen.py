"""Frozen features, baselines and the probe by their commands, and the probe beside a pre-training that it must not change."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from people import draw_few_people
from programs import ROOT, launch

from personmae import batch_plan, config, dist, precision
from personmae.__main__ import main
from personmae.checkpoint import portable
from personmae.monitor import run_log
from personmae.monitor.rank_metrics import RankMetrics
from personmae.pretrain import build_engine, build_model
from personmae.pretrain_probe import Prober

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("in_checkout")]
SCORES = ("mAP", "rank1", "rank5", "rank10", "mINP")


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A benchmark of 6 identities to train and to test on."""
    return draw_few_people(tmp_path_factory.mktemp("synth"), 6, distractors=2, junk=1) / "market1501"


def pretraining(shards: Path, run_dir: Path, *overrides: str) -> list[str]:
    """Four steps, saved after two of them."""
    small = ["train.global_batch_size=4", "train.total_steps=4", "checkpoint.every_steps=2", "checkpoint.keep_last=9"]
    where = [f"data.shards={shards}", f"run_dir={run_dir}", "data.num_threads=1", "data.shuffle_block_size=32"]
    common = ["engine.name=native", "train.precision=fp32", "train.log_every=1"]
    return ["configs/quickstart.yaml", *common, *where, *small, *overrides]


def pretrain(shards: Path, run_dir: Path, *overrides: str) -> None:
    assert main(["pretrain", *pretraining(shards, run_dir, *overrides)]) == 0


@pytest.fixture(scope="module")
def pretrained(shard_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        patch.chdir(ROOT)
        run_dir = tmp_path_factory.mktemp("pretrained") / "run"
        pretrain(shard_dir, run_dir)
    return run_dir


def evaluate(*arguments: str | Path) -> int:
    return main(["evaluate", *map(str, arguments)])


def read(out: Path) -> dict[str, Any]:
    return json.loads((out / "result.json").read_text())


def records(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_probe_prints_two_rows_and_records_both(pretrained, market, tmp_path, capsys):
    assert evaluate(pretrained, "market1501", market, "--probe", "--out", tmp_path / "probe") == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if " mAP " in line]
    record = read(tmp_path / "probe")
    assert [line.split("  ")[0] for line in printed] == ["run, rows", "run, LDA"]
    for line, name in zip(printed, ("rows", "lda"), strict=True):
        assert set(record["probe"][name]) == set(SCORES)
        assert 0 < record["probe"][name]["mAP"] < 1
        assert f"mAP {100 * record['probe'][name]['mAP']:5.1f}" in line
        assert f"rank1 {100 * record['probe'][name]['rank1']:5.1f}" in line
    assert record["mAP"] == record["probe"]["rows"]["mAP"]
    assert record["init"].endswith("frozen, rows whitened per camera")
    assert record["step"] == 4
    assert (
        evaluate(pretrained, "market1501", market, "--pool", "rows", "--per-camera", "whiten", "--out", tmp_path / "rows") == 0
    )
    assert read(tmp_path / "rows")["mAP"] == pytest.approx(record["mAP"], abs=1e-6)


def test_random_weights_are_the_control_of_a_probe(pretrained, market, tmp_path):
    random = ["random", "market1501", market, "--probe", "--size", "micro", "--img-size", "128x64"]
    for name, seed in (("one", "1"), ("same", "1"), ("other", "2")):
        assert evaluate(*random, "--seed", seed, "--out", tmp_path / name) == 0
    one, same, other = (read(tmp_path / name) for name in ("one", "same", "other"))
    assert one["probe"] == same["probe"] != other["probe"]
    assert one["random"] == {"size": "micro", "img_size": [128, 64], "seed": 1}
    assert one["init"] == "random micro, seed 1, frozen, rows whitened per camera"
    assert evaluate("random", "market1501", market, "--pool", "mean", "--size", "micro", "--img-size", "128x64") == 0


def test_the_baselines_need_no_training(market, tmp_path):
    found = {}
    for name in ("histogram", "thumbnail", "thumbnail+histogram"):
        assert evaluate(name, "market1501", market, "--out", tmp_path / name) == 0
        record = found[name] = read(tmp_path / name)
        assert (record["name"], record["init"]) == (name, "no training, standardised per camera")
    assert evaluate("thumbnail", "market1501", market, "--per-camera", "whiten", "--out", tmp_path / "white") == 0
    assert read(tmp_path / "white")["name"] == "thumbnail, whiten"
    assert len({record["mAP"] for record in found.values()} | {read(tmp_path / "white")["mAP"]}) == 4


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["histogram", "--probe"], "--probe is for pre-trained encoders. 'histogram' has no tokens: leave it out"),
        (["histogram", "--latency"], "--latency is the time of a model. 'histogram' has none: leave it out"),
        (["RUN", "--probe", "--latency"], "--latency is the time of one feature, and --probe reads two"),
        (["thumbnail", "--pool", "mean"], "'thumbnail' has no tokens: leave it out"),
        (["random"], "'random' weights have no head. Give --probe, or --pool mean"),
        (["random", "--probe", "--img-size", "100x64"], "--img-size must be multiples of 16 pixels. Got 100x64"),
        (["RUN"], "pre-trained only: run 'personmae finetune' first, or see with --probe, or --pool mean"),
        (["RUN", "--probe", "--pool", "mean"], "--probe says itself what is compared. Leave out --pool"),
        (["RUN", "--probe", "--per-camera", "none"], "--probe says itself what is compared"),
        (["RUN", "--pool", "mean", "--seed", "1"], "--seed is for 'random' weights. "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_do_not_go_together_are_one_line(pretrained, market, capsys, arguments, expected):
    where, *options = [str(pretrained) if argument == "RUN" else argument for argument in arguments]
    assert evaluate(where, "market1501", market, *options) == 78
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert expected in line


def test_a_probe_at_checkpoints_changes_nothing_of_the_training(shard_dir, market, pretrained, tmp_path):
    on = ["probe.benchmark=market1501", f"probe.root={market}"]
    pretrain(shard_dir, tmp_path / "run", *on)
    plain, probed = records(pretrained), records(tmp_path / "run")
    assert [record["loss"] for record in probed] == [record["loss"] for record in plain]
    assert len({record["loss"] for record in plain}) == 4
    assert [{key for key in record if key.startswith("probe")} for record in probed] == [
        set(),
        {"probe_rows_map", "probe_lda_map"},
        set(),
        {"probe_rows_map", "probe_lda_map"},
    ]
    one, other = (portable.read(portable.locate(run)) for run in (pretrained, tmp_path / "run"))
    assert all((one.tensors["student"][name] == tensor).all() for name, tensor in other.tensors["student"].items())
    for step, logged in ((2, probed[1]), (4, probed[3])):
        (path,) = [path for path in portable.folders(tmp_path / "run") if portable.step_of(path.name) == step]
        assert evaluate(path, "market1501", market, "--probe", "--out", tmp_path / "out") == 0
        found = read(tmp_path / "out")["probe"]
        assert logged["probe_rows_map"] == pytest.approx(found["rows"]["mAP"], abs=1e-6)
        assert logged["probe_lda_map"] == pytest.approx(found["lda"]["mAP"], abs=1e-6)


def test_a_step_that_is_not_logged_otherwise_is_logged_with_its_probe_and_a_run_may_take_one_up(shard_dir, market, tmp_path):
    pretrain(shard_dir, tmp_path / "run", "train.log_every=3")
    (path,) = [path for path in portable.folders(tmp_path / "run") if portable.step_of(path.name) == 4]
    for file in path.iterdir():
        file.unlink()
    path.rmdir()  # as if it had been killed
    assert [record["step"] for record in records(tmp_path / "run")] == [3, 4]
    pretrain(shard_dir, tmp_path / "run", "train.log_every=3", "probe.benchmark=market1501", f"probe.root={market}")
    assert [(record["step"], "probe_lda_map" in record) for record in records(tmp_path / "run")] == [(3, False), (4, True)]
    pretrain(shard_dir, tmp_path / "new", "train.log_every=3", "probe.benchmark=market1501", f"probe.root={market}")
    assert [(record["step"], "probe_lda_map" in record) for record in records(tmp_path / "new")] == [
        (2, True),
        (3, False),
        (4, True),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("engine", [["engine.name=fsdp"], ["engine.name=deepspeed", "engine.deepspeed.zero_stage=3"]])
def test_two_ranks_that_share_the_parameters_log_the_probe_of_all_of_them(shard_dir, market, tmp_path, engine):
    on = ["probe.benchmark=market1501", f"probe.root={market}", *engine]
    options = ["--standalone", "--nproc-per-node", "2", "launcher/pretrain.py", "--config"]
    done = launch("torchrun", *options, *pretraining(shard_dir, tmp_path / "run", *on))
    assert done.returncode == 0, done.stderr[-3000:]
    assert evaluate(tmp_path / "run", "market1501", market, "--probe", "--out", tmp_path / "out") == 0
    found, logged = read(tmp_path / "out")["probe"], records(tmp_path / "run")[-1]
    assert logged["probe_rows_map"] == pytest.approx(found["rows"]["mAP"], abs=1e-4)
    assert logged["probe_lda_map"] == pytest.approx(found["lda"]["mAP"], abs=1e-4)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["probe.benchmark=market1501"], "'probe' in the command line: benchmark=market1501 and root=None belong together"),
        (["probe.benchmark=market1501", "probe.root=/nowhere"], "but /nowhere does not exist"),
    ],
)
def test_a_probe_that_cannot_be_measured_is_told_before_the_first_step(shard_dir, tmp_path, capsys, overrides, expected):
    where = [f"data.shards={shard_dir}", f"run_dir={tmp_path / 'run'}", "engine.name=native", *overrides]
    assert main(["pretrain", "configs/quickstart.yaml", *where]) == 78
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_probe_that_is_stopped_or_finds_no_numbers_is_left_out_and_ends_nothing(market, shard_dir, tmp_path, capsys):
    path, *overrides = pretraining(shard_dir, tmp_path, "probe.benchmark=market1501", f"probe.root={market}")
    settings = config.load(config.Pretrain, path, overrides)
    world, stop, metrics = dist.read_world(), dist.StopSignal(), RankMetrics("pretrain")
    model = build_model(settings, precision.choose("fp32", "cpu"))
    engine = build_engine(settings, model, batch_plan.plan_batch(4, 1, 4))
    prober = Prober(settings, model.encoder, world)
    log = run_log.RunLog(tmp_path, is_first=True, title="pretrain", total_steps=4, first_step=0)
    assert set(prober.run(engine, 2, log, metrics, stop)) == {"probe_rows_map", "probe_lda_map"}
    with torch.no_grad():
        model.encoder.norm.weight[0] = float("nan")
    assert prober.run(engine, 2, log, metrics, stop) == {}
    assert "the probe is left out: " in (output := capsys.readouterr().out)
    assert "features are not finite" in output
    signal.raise_signal(signal.SIGTERM)
    assert prober.run(engine, 2, log, metrics, stop) == {}
    assert "the probe is left out: while features were extracted" in capsys.readouterr().out
    log.close()
    metrics.close(lambda: True)
