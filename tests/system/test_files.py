"""Small files of a run: whatever happens in the middle of a write, what was there stays."""

import json
import os
from pathlib import Path

import pytest
from full_disk import full_disk

from personmae.system import files

OLD = '{"old": true}\n'


def test_numbers_that_are_not_finite_become_null_at_any_depth() -> None:
    text = files.to_json({"a": [1.5, float("nan"), {"b": (float("inf"), "NaN", True)}], "c": None, "d": 3})
    assert json.loads(text, parse_constant=pytest.fail) == {"a": [1.5, None, {"b": [None, "NaN", True]}], "c": None, "d": 3}
    assert files.to_json({"a": 0.1, "b": "é"}, indent=1) == json.dumps({"a": 0.1, "b": "é"}, indent=1)


def test_a_full_disk_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(OLD)
    with full_disk(), pytest.raises(OSError, match="large"):
        files.replace(path, "new" * 1000)
    assert path.read_text() == OLD
    assert os.listdir(tmp_path) == ["run.json"]
    files.replace(path, "new")
    assert path.read_text() == "new"


def test_a_link_is_followed_and_a_device_is_written_to(tmp_path: Path) -> None:
    path, link = tmp_path / "real", tmp_path / "link"
    path.write_text(OLD)
    link.symlink_to(path)
    files.replace(link, "new")
    assert link.is_symlink()
    assert path.read_text() == "new"
    files.replace(Path("/dev/null"), "lost")
    assert not Path("/dev/null").is_file()
    assert not Path("/dev/.partial-null").exists()


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        ('{"step": 1}\n{"step": 2}\n{"step": 3}\n', '{"step": 1}\n{"step": 2}\n'),
        ('{"step": 1}\n{"st', '{"step": 1}\n'),
        ('{"step": 1}\nx{"broken\n{"step": 2}\n{"step": 9}\n', '{"step": 1}\nx{"broken\n{"step": 2}\n'),
        ('{"step": 1}\r\n{"step": 2}\r\n{"step": 9}\r\n', '{"step": 1}\r\n{"step": 2}\r\n'),
        ('{"step": 7}\n', ""),
        ("", ""),
    ],
)
def test_records_beyond_a_step_are_cut_off_and_what_a_kill_broke_too(tmp_path: Path, content: str, kept: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content.encode())
    with full_disk():
        files.cut_lines(path, lambda record: record["step"] <= 2)
    assert path.read_bytes() == kept.encode()
    files.cut_lines(tmp_path / "none.jsonl", lambda record: True)
    assert not (tmp_path / "none.jsonl").exists()
