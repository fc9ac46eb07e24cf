"""doctor tells what is here and what would fail, survives what is broken, and keeps secrets."""

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from personmae.__main__ import main
from personmae.errors import UserError
from personmae.inspect import doctor
from personmae.inspect.doctor import Outcome

SECRET = "wJalrXUtnFEMI-not-a-real-key"
EXPECTED = '[{"what": "precision", "is_slow": true, "text": "give train.precision=fp32"}]'
EXPECTED = EXPECTED.replace("{", "{{").replace("}", "}}")  # it is formatted


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, fresh_s3_client: Callable[[], None]) -> None:
    """Only torch is probed, no compiler is started; credentials are in the environment."""
    monkeypatch.setattr(doctor, "PROBES", {"torch": doctor.PROBES["torch"]})
    monkeypatch.setattr(doctor, "ESTIMATE", f"print({EXPECTED!r})  # {{path}} {{quickstart_alone}}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", SECRET)
    monkeypatch.setenv("S3_ENDPOINT_URL", f"http://user:{SECRET}@127.0.0.1:9")


def test_doctor_reports_torch_and_every_verb_and_no_secret(
    quick: None, shard_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    doctor.run(shards=str(shard_dir))
    printed = "".join(capfd.readouterr())
    for expected in (
        version("torch"),
        "a product runs",
        "slow",
        "give train.precision=fp32",
        "found (env)",
        "http://127.0.0.1:9",
        "50 images",
        "first image",
    ):
        assert expected in printed
    for verb in doctor.VERBS:
        assert f" {verb} " in printed
    assert SECRET not in printed
    assert "AKIAEXAMPLE" not in printed


def test_shards_that_cannot_be_read_are_a_user_error_after_everything_is_told(
    quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "probe_all", lambda: {name: Outcome(True, "") for name in _everything()})
    with pytest.raises(UserError, match=r"cannot be read: a data set with index\.json is required"):
        doctor.run(shards=str(tmp_path))
    assert "pretrain" in capfd.readouterr().out
    with pytest.raises(UserError, match="cannot be read") as raised:
        doctor.run(shards="s3://bucket/prefix")
    assert SECRET not in str(raised.value)
    assert SECRET not in "".join(capfd.readouterr())


def test_every_verb_of_the_command_line_is_judged() -> None:
    code = "from personmae.__main__ import main; main(['--help'])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout
    verbs = [line.split()[0] for line in printed.splitlines() if line.startswith("    ") and line[4] != " "]
    assert set(doctor.VERBS) <= set(verbs)
    assert {"synth", "pretrain", "finetune", "evaluate"} <= set(doctor.VERBS)


def test_a_probe_that_fails_hangs_or_crashes_is_told_in_one_line() -> None:
    assert doctor.probe("print('noise'); print('fine')", 20) == Outcome(True, "fine")
    failed = doctor.probe("raise RuntimeError('operator torchvision::nms does not exist')", 20)
    assert failed == Outcome(False, "RuntimeError: operator torchvision::nms does not exist")
    assert doctor.probe("import os; os.abort()", 20) == Outcome(False, "the process ended with -6")
    assert doctor.probe("import time; time.sleep(20)", 0.5) == Outcome(False, "no answer within 0.5 s")


def test_a_missing_compiler_stops_only_what_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++")
    outcomes = {name: Outcome(True, "") for name in _everything()} | {"compiler": doctor.find_compiler()}
    output = doctor.commands(outcomes)
    assert [verb for verb, outcome in output.items() if not outcome.works] == ["pretrain"]
    assert "no C++ compiler (/nowhere/g++)" in output["pretrain"].detail
    assert "train.compile=false" in output["pretrain"].detail


def test_a_broken_torch_stops_what_needs_it_and_not_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PROBES", {"torch": "raise OSError('libtorch_cpu.so: cannot open shared object file')"})
    monkeypatch.setattr(doctor, "IMPORT_ALL", "import json; print(json.dumps({name: 'no torch' for name in names[1:-1]}))")
    output = doctor.commands(doctor.probe_all())
    assert output["synth"].works
    assert output["doctor"].works
    assert "libtorch_cpu.so" in output["pretrain"].detail
    assert output["shards"] == Outcome(False, "personmae.data.importer does not import: no torch")


def test_the_exit_code_says_whether_something_named_would_fail(
    quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    works = {name: Outcome(True, "") for name in _everything()}
    monkeypatch.setattr(doctor, "probe_all", lambda: works | {"deepspeed": Outcome(False, "ImportError: no")})
    monkeypatch.setattr(doctor, "find_compiler", lambda: Outcome(True, ""))
    assert main(["doctor"]) == 1
    assert "would fail here: pretrain. The table" in capsys.readouterr().err
    monkeypatch.setattr(doctor, "probe_all", lambda: works)
    assert main(["doctor"]) == 0
    monkeypatch.setattr(doctor, "ESTIMATE", "raise RuntimeError('no step runs {path} {quickstart_alone}')")
    assert main(["doctor"]) == 1
    assert "no step runs" in capsys.readouterr().out
    (tmp_path / "suite.yaml").write_text("nothing: 1\n", encoding="utf-8")
    assert main(["doctor", "--config", str(tmp_path / "suite.yaml")]) == 78
    assert "--config takes a file of pretrain, finetune, unsupervised" in capsys.readouterr().err


def test_a_quickstart_that_has_begun_is_not_measured_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "ESTIMATE", f"print({EXPECTED!r})  # {{path}} {{quickstart_alone}}")
    doctor.print_quickstart()
    assert capsys.readouterr().out.splitlines()[1:] == ["precision: give train.precision=fp32"]
    (tmp_path / "runs/quickstart/pretrain/checkpoints").mkdir(parents=True)
    doctor.print_quickstart()
    assert capsys.readouterr().out == "make quickstart continues in runs/quickstart\n"


def _everything() -> list[str]:
    return [*doctor.PROBES, "compiler", "disk", *(module for module, _ in doctor.VERBS.values())]
