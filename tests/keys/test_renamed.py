"""Keys that have a new name: old files, old overrides and old run folders are read, and the new name is printed once."""

from pathlib import Path

import pytest

from personmae import config
from personmae.errors import UserError
from personmae.keys import renamed
from personmae.keys.mistakes import dotted_keys

MINIMAL = "run_dir: out\ndata: {shards: in}\n"
NOTE = "note: checkpoint.store is called checkpoint.upload_to now\n"


@pytest.fixture(autouse=True)
def _untold() -> None:
    renamed.print_new_name.cache_clear()


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def upload_to(path: Path, *overrides: str) -> str | None:
    return config.load(config.Pretrain, path, overrides).checkpoint.upload_to


def test_a_file_with_the_old_key_is_read_and_the_new_name_printed_once(tmp_path, capsys):
    old = written(tmp_path / "old.yaml", MINIMAL + "checkpoint: {store: s3://b/run, keep_last: 3}\n")
    settings = config.load(config.Pretrain, old)
    assert (settings.checkpoint.upload_to, settings.checkpoint.keep_last) == ("s3://b/run", 3)
    assert upload_to(old) == "s3://b/run"
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", NOTE)
    again = written(tmp_path / "again.yaml", config.dump_yaml(settings))
    assert "store" not in again.read_text()
    assert config.load(config.Pretrain, again) == settings


@pytest.mark.parametrize("override", ["checkpoint.store=s3://$BUCKET/run/", "checkpoint={store: s3://$BUCKET/run/}"])
def test_an_override_with_the_old_key_is_read_as_the_new_one(tmp_path, capsys, monkeypatch, override):
    monkeypatch.setenv("BUCKET", "b")
    path = written(tmp_path / "run.yaml", MINIMAL)
    assert upload_to(path, override) == upload_to(path, override.replace("store", "upload_to")) == "s3://b/run"
    assert capsys.readouterr().err == NOTE


def test_what_comes_later_wins_whichever_name_it_has(tmp_path):
    written(tmp_path / "base.yaml", MINIMAL + "checkpoint: {store: s3://base/run}\n")
    path = written(tmp_path / "run.yaml", "_base_: base.yaml\ncheckpoint: {upload_to: s3://file/run}\n")
    assert upload_to(path) == "s3://file/run"
    assert upload_to(path, "checkpoint.store=s3://line/run") == "s3://line/run"
    assert upload_to(path, "checkpoint.store=s3://line/run", "checkpoint.upload_to=null") is None


def test_both_names_in_one_file_are_refused(tmp_path):
    path = written(tmp_path / "run.yaml", MINIMAL + "checkpoint: {store: s3://b/old, upload_to: s3://b/new}\n")
    with pytest.raises(UserError, match=r"is called checkpoint.upload_to now, and .*run.yaml sets both: leave out"):
        config.load(config.Pretrain, path)


def test_a_mistake_under_the_old_key_is_still_one_line(tmp_path):
    path = written(tmp_path / "run.yaml", MINIMAL)
    with pytest.raises(UserError, match="must be a location like s3://"):
        upload_to(path, "checkpoint.store=somewhere")
    with pytest.raises(UserError, match="valid dictionary"):
        config.load(config.Pretrain, written(tmp_path / "text.yaml", MINIMAL + "checkpoint: store\n"))


def test_other_ranks_do_not_repeat_the_new_name(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert upload_to(written(tmp_path / "run.yaml", MINIMAL), "checkpoint.store=s3://b/run") == "s3://b/run"
    assert capsys.readouterr().err == ""


VALUES = {"checkpoint.store": "s3://b/run", "train.cutter": "triton"}


@pytest.mark.parametrize("old", renamed.RENAMED)
def test_every_old_key_sets_the_new_one(tmp_path, capsys, old):
    path, new = written(tmp_path / "run.yaml", MINIMAL), renamed.RENAMED[old]
    settings = config.load(config.Pretrain, path, [f"{old}={VALUES[old]}"])
    assert capsys.readouterr().err == f"note: {old} is called {new} now\n"
    assert settings == config.load(config.Pretrain, path, [f"{new}={VALUES[old]}"]) != config.load(config.Pretrain, path)


def test_every_new_name_is_a_key_and_no_old_one_is():
    known = {key for kind in config.PROGRAMS.values() for key in dotted_keys(kind)}
    assert set(renamed.RENAMED.values()) <= known
    assert not known & renamed.RENAMED.keys()
    assert all(old.rpartition(".")[0] == new.rpartition(".")[0] for old, new in renamed.RENAMED.items())
