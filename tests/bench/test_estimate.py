"""What doctor concludes from a few steps: conclusions for given rates, and one measurement of small steps."""

import json
from pathlib import Path

import pytest

from personmae import config
from personmae.bench import estimate
from personmae.bench.counts import MODELS, Work, spec_at
from personmae.bench.estimate import Speeds, config_lines, precision_line, quickstart_lines, size_lines
from personmae.precision import Native, choose, native_cpu

ROOT = Path(__file__).parents[2]
WITH, WITHOUT = Native(True, "this CPU has bf16 instructions"), Native(False, "this CPU has no bf16 instructions")
MICRO = 1e11  # operations a second


@pytest.mark.parametrize(
    ("native", "bf16", "fp32", "is_slow", "said"),
    [
        (WITH, 200e9, 100e9, False, "bf16, by auto: this CPU has bf16 instructions. Products: 200 GFLOP/s in bf16"),
        (WITHOUT, 2.1e9, 48e9, False, "Slow here: train.precision=bf16, at 1/23 of fp32's rate"),
        (WITHOUT, 40e9, 48e9, False, "Slow here: train.precision=bf16, at 83% of fp32's rate"),
        (WITH, 2e9, 48e9, True, "auto's choice was slower when measured. Give train.precision=fp32"),
        (WITHOUT, 96e9, 48e9, True, "auto's choice was slower when measured. Give train.precision=bf16"),
    ],
)
def test_a_slow_precision_is_never_told_without_a_conclusion(
    native: Native, bf16: float, fp32: float, is_slow: bool, said: str
) -> None:
    line = precision_line(native, {"bf16": bf16, "fp32": fp32})
    assert line.is_slow == is_slow
    assert said in line.text
    assert "0.0" not in line.text
    assert ("Slow" in line.text) == (bf16 < fp32 or is_slow)


def test_sizes_that_were_not_measured_follow_by_their_operations() -> None:
    small = Work("small", spec_at(MODELS["small"])).flops
    lines = {line.what: line.text for line in size_lines(Speeds({"micro": MICRO, "small": 30 * small}, 1.0, 1.0))}
    assert lines["small at 256x128"] == "about 30 images/s"
    base = 30 * small / Work("base", spec_at(MODELS["base"])).flops
    assert lines["base at 256x128"] == f"about {base:.2g} images/s, counted from small's"
    assert len(lines) == len(MODELS) - 1  # all but large, which nobody trains on such a machine


def test_the_quickstart_is_its_steps_its_drawing_and_its_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    chosen = choose("fp32", "cpu")

    def minutes(speeds: Speeds) -> int:
        (line,) = quickstart_lines(speeds, chosen)
        assert "precision fp32 (as set)" in line.text
        return int(line.text.split()[1])

    nothing = Speeds({"micro": 1e30}, drawing=1e30, start=0.0)
    assert minutes(nothing) == 1
    settings = config.load(config.Pretrain, "configs/quickstart.yaml")
    images = (settings.train.total_steps or 0) * settings.train.global_batch_size
    trained = images * Work("micro", spec_at((128, 64)), decoder_depth=settings.decoders.depth).flops
    steps = minutes(Speeds({"micro": MICRO}, drawing=1e30, start=0.0))
    assert trained / MICRO / 60 < steps < 1.6 * trained / MICRO / 60  # the rest is fine-tuning
    assert minutes(Speeds({"micro": 1e30}, drawing=10.0, start=0.0)) == round(29_700 / 10 / 60)
    assert minutes(Speeds({"micro": 1e30}, drawing=1e30, start=60.0)) == 8


def test_a_configuration_that_does_not_fit_the_machine_is_called_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    path = tmp_path / "own.yaml"
    speeds = Speeds({"micro": MICRO, "small": MICRO}, 1.0, 1.0)
    base = f"_base_: {ROOT / 'configs/quickstart.yaml'}\n"
    path.write_text(base + "train:\n  precision: bf16\n", encoding="utf-8")
    precision, speed = config_lines(str(path), speeds, "cpu")
    assert precision.is_slow
    assert "train.precision=fp32 is faster" in precision.text
    assert speed.text == "not estimated in bf16"
    path.write_text(base, encoding="utf-8")
    precision, speed = config_lines(str(path), speeds, "cpu")
    assert not precision.is_slow
    assert speed.text.endswith("minutes in all")


def test_a_few_steps_of_this_machine_become_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setitem(estimate._BATCHES, "cpu", {"micro": 2, "small": 1})
    monkeypatch.setitem(estimate._SIDE, "cpu", 64)
    estimate.main("configs/finetune_market1501.yaml")
    lines = json.loads(capsys.readouterr().out.splitlines()[-1])
    sizes = [f"{size} at {height}x{width}" for size, (height, width) in MODELS.items() if size != "large"]
    tuned = "configs/finetune_market1501.yaml: precision"
    assert [line["what"] for line in lines] == ["precision", *sizes, tuned, "make quickstart"]
    assert lines[0]["text"].startswith(f"{native_cpu().best}, by auto: ")
    assert all(float(line["text"].split()[1].replace(",", "")) > 0 for line in lines[1:4])
