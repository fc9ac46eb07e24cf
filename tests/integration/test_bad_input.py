"""Bad input ends within seconds with one line and code 78, and leaves nothing behind."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from programs import one_line_error, personmae

pytestmark = pytest.mark.integration
PRETRAIN = ("pretrain", "configs/quickstart.yaml")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["loss.feature_wieght=1"], ["unknown key 'loss.feature_wieght'", "the command line", "'loss.feature_weight'"]),
        (["train.total_steps=many"], ["'train.total_steps' in the command line", "integer", "Got 'many'"]),
        (["model.img_size=[100,64]"], ["img_size=(100, 64) must be multiples of patch_size=16"]),
        (["train.global_batch_size"], ["an override must look like section.key=value"]),
        (["data.shards=runs/no/such/place"], ["runs/no/such/place does not exist"]),
        (["data.shards=tests"], ["tests has none", "personmae shards write"]),
    ],
)
def test_a_wrong_setting_is_named_with_what_would_be_right(arguments: list[str], expected: list[str], tmp_path: Path) -> None:
    line = one_line_error(personmae(*PRETRAIN, f"run_dir={tmp_path / 'run'}", *arguments))
    assert all(part in line for part in expected), line
    assert not (tmp_path / "run").exists()


def test_an_empty_folder_is_refused_and_a_text_file_named_jpg_is_left_out_and_listed(tmp_path: Path, images: Path) -> None:
    (tmp_path / "empty").mkdir()
    line = one_line_error(personmae("shards", "write", tmp_path / "empty", tmp_path / "out"))
    assert "parquet files are required. " in line
    mixed = tmp_path / "mixed"
    shutil.copytree(images, mixed)
    (mixed / "0500.jpg").write_text("this is not an image")
    assert not list(tmp_path.glob("out*"))
    written = personmae("shards", "write", mixed, tmp_path / "out")
    assert written.returncode == 0, written.stderr
    place = f"{tmp_path}/out/rejects.jsonl"
    expected = f"50 images written to {tmp_path}/out. 1 left out, listed in {place}: 1 no image that can be decoded (first: "
    assert written.stdout.splitlines()[-1].startswith(expected)
    assert '"key": "0500.jpg"' in Path(place).read_text()


def test_a_truncated_shard_is_refused_before_the_first_step(shard_dir: Path, tmp_path: Path) -> None:
    broken = tmp_path / "shards"
    shutil.copytree(shard_dir, broken)
    victim = sorted(broken.glob("*.mds"))[1]
    os.truncate(victim, victim.stat().st_size // 2)
    line = one_line_error(personmae(*PRETRAIN, f"data.shards={broken}", f"run_dir={tmp_path / 'run'}"))
    assert victim.name in line
    assert "must have" in line
    assert not (tmp_path / "run").exists()


def test_a_global_batch_larger_than_the_data_is_refused(shard_dir: Path, tmp_path: Path) -> None:
    where = [f"data.shards={shard_dir}", f"run_dir={tmp_path / 'run'}"]
    line = one_line_error(personmae(*PRETRAIN, *where, "train.global_batch_size=128"))
    assert "one global batch needs 128 samples" in line
    assert "holds 50" in line


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    mount = tmp_path / "disk"
    mount.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mount], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("a small file system can only be mounted by root")
    yield mount
    subprocess.run(["umount", "-l", mount], check=True)


def test_a_full_disk_ends_the_command_and_leaves_no_half_written_data_set(
    small_disk: Path, images: Path, tmp_path: Path
) -> None:
    many = tmp_path / "many"
    for copy in range(30):
        shutil.copytree(images, many / str(copy))
    line = one_line_error(personmae("shards", "write", many, small_disk / "shards"))
    assert "the disk is full" in line
    assert not list(small_disk.iterdir())


def test_a_full_disk_ends_a_run_and_keeps_its_last_checkpoint(small_disk: Path, shard_dir: Path) -> None:
    line = one_line_error(
        personmae(
            *PRETRAIN,
            f"data.shards={shard_dir}",
            f"run_dir={small_disk / 'run'}",
            "train.global_batch_size=16",
            "train.total_steps=2",
            "engine.name=native",
        )
    )
    assert "the disk is full" in line
    assert not list((small_disk / "run" / "checkpoints").iterdir())
