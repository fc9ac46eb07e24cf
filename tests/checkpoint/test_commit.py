"""What is deleted of a run's checkpoints, and what is moved out of the way instead."""

from pathlib import Path
from typing import Any

import pytest
import torch
from on_disk import write_checkpoint

from personmae.checkpoint import commit, portable
from personmae.checkpoint.portable import Checkpoint


def write(run: Path, *steps: int) -> list[Path]:
    return [write_checkpoint(run, Checkpoint(step, {"student": {"w": torch.ones(3)}}, {}), keep_last=9) for step in steps]


def names(run: Path) -> list[str]:
    return sorted(path.name for path in portable.folder(run).iterdir())


@pytest.mark.parametrize(
    ("line", "options", "deleted"),
    [
        ({1, 2, 3, 4, 5, 6}, {"keep_last": 2}, [1, 2, 3, 4]),
        ({1, 2, 3, 4, 5, 6}, {"keep_last": 1, "keep_every": 3}, [1, 2, 4, 5]),
        ({1, 2, 3, 6}, {"keep_last": 2}, [1, 2]),  # 4 and 5 were passed over: they neither count nor go
        ({1, 2}, {"keep_last": 3, "keep_every": 2}, []),
        (set(), {"keep_last": 1}, []),
    ],
)
def test_surplus_is_what_is_neither_among_the_last_nor_kept_for_good(line, options, deleted):
    assert commit.surplus([6, 5, 4, 3, 2, 1], line, **options) == deleted


def test_a_checkpoint_that_is_a_link_is_unlinked_and_what_it_points_at_stays_whole(tmp_path):
    (path,) = write(tmp_path / "other", 1)
    portable.folder(tmp_path / "run").mkdir(parents=True)
    (portable.folder(tmp_path / "run") / path.name).symlink_to(path)
    commit.delete(tmp_path / "run", [1])
    assert names(tmp_path / "run") == []
    assert portable.find_fault(path) is None


def test_what_cannot_be_deleted_is_told_and_the_rest_is(tmp_path, monkeypatch):
    paths, real = write(tmp_path, 1, 2, 3), commit.shutil.rmtree

    def busy(path: Path, **options: Any) -> None:
        if path == paths[0]:
            raise OSError(16, "Device or resource busy", str(path))
        real(path, **options)

    monkeypatch.setattr(commit.shutil, "rmtree", busy)
    assert [*commit.delete(tmp_path, [1, 2])] == [paths[0]]
    assert names(tmp_path) == ["LATEST", "step-00000001", "step-00000003"]


def test_what_is_moved_aside_keeps_its_content_and_takes_a_free_name(tmp_path):
    root = portable.folder(tmp_path)
    for name in ("step-00000005", "step-00000005.2"):
        (path,) = write(tmp_path, 5)
        before = {file.name: file.read_bytes() for file in path.iterdir()}
        assert commit.set_aside(tmp_path, [5]) == ([root / "passed-over" / name], {})
        assert {file.name: file.read_bytes() for file in (root / "passed-over" / name).iterdir()} == before
    assert portable.folders(tmp_path) == []
    assert commit.set_aside(tmp_path, [5]) == ([], {})
