"""``personmae extract``: a feature and a name for every image of a source, the same after any number of kills."""

import hashlib
import json
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import small_runs
import torch
import warm
from full_disk import full_disk
from small_runs import personmae, refusal

import personmae as package
from personmae.errors import Stopped, TooManyRejects, UserError
from personmae.weights import extract, feature_file
from personmae.weights.extract import gpu_of
from personmae.weights.extract_images import open_images


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_runs.make(tmp_path_factory.mktemp("model") / "run", "bnneck")


@pytest.fixture(autouse=True)
def _signals(restore_signals: None) -> None:
    """Programs that run in this process take signals."""


def rows_of(path: Path) -> dict[str, np.ndarray]:
    """Features by id."""
    found = feature_file.read(path)
    assert len(set(found.ids)) == len(found.ids)
    return dict(zip(found.ids, found.features, strict=True))


def loaded(run: Path, paths: list[Path]) -> torch.Tensor:
    return package.load(run, device="cpu").features(paths)


# --- sources ---


def test_a_folder_gives_what_load_gives_for_each_image(run, images, tmp_path):
    result = personmae("extract", images, tmp_path / "f.parquet", "--model", run)
    assert result.returncode == 0, result.stderr
    assert "50 features of 128 numbers written to" in result.stdout
    assert "50 of 50 images" in result.stderr
    found, paths = rows_of(tmp_path / "f.parquet"), sorted(images.rglob("*.jp*g"))
    assert sorted(found) == sorted(str(path.relative_to(images)) for path in paths)
    ours = torch.from_numpy(np.stack([found[str(path.relative_to(images))] for path in paths]))
    torch.testing.assert_close(ours, loaded(run, paths), rtol=1e-5, atol=1e-6)
    assert ours.std(dim=0).max() > 1e-4
    assert os.listdir(tmp_path) == ["f.parquet"]


def test_parquet_is_read_by_its_own_library_and_says_which_model_it_is_of(run, images, tmp_path):
    extract.run(str(images), tmp_path / "f.parquet", model=str(run), num_processes=1)
    table = pq.read_table(tmp_path / "f.parquet")
    assert table.column_names == ["id", "feature"]
    assert len(table["feature"][0].as_py()) == 128
    about = json.loads(table.schema.metadata[b"personmae"])
    assert about["precision"] == "fp32"
    assert about["model"] == extract.digest(package.load(run, device="cpu"))


def test_npy_has_the_same_rows_and_a_list_of_ids(run, images, tmp_path):
    for name in ("f.parquet", "f.npy"):
        extract.run(str(images), tmp_path / name, model=str(run), num_processes=1)
    assert np.load(tmp_path / "f.npy").shape == (50, 128)
    one, two = feature_file.read(tmp_path / "f.npy"), feature_file.read(tmp_path / "f.parquet")
    assert one.ids == two.ids
    np.testing.assert_array_equal(one.features, two.features)


def test_npy_is_what_numpy_writes_and_a_full_disk_is_an_error(tmp_path):
    """A file that is mapped would end the process by a signal there."""
    features = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    parts = [feature_file.Rows(["a", "b"], {}, features[:2]), feature_file.Rows(["c", "d", "e"], {}, features[2:])]
    (tmp_path / "staging").mkdir()
    write = partial(feature_file.write, staging=tmp_path / "staging", parts=parts, num_rows=5, dim=3, about={})
    write(tmp_path / "f.npy")
    np.save(tmp_path / "theirs.npy", features)
    assert (tmp_path / "f.npy").read_bytes() == (tmp_path / "theirs.npy").read_bytes()
    with full_disk(), pytest.raises(OSError, match="File too large"):
        write(tmp_path / "g.npy")
    assert not (tmp_path / "g.npy").exists()


def test_one_image_is_a_source_too(run, images, tmp_path):
    path = next(images.glob("*.jpg"))
    extract.run(str(path), tmp_path / "f.npy", model=str(run), num_processes=1)
    found = feature_file.read(tmp_path / "f.npy")
    assert found.ids == [path.name]
    torch.testing.assert_close(torch.tensor(found.features), loaded(run, [path]), rtol=1e-5, atol=1e-6)


def test_a_list_of_paths_is_taken_in_its_order(run, images, tmp_path):
    names = [str(path) for path in sorted(images.rglob("*.jp*g"))[5:0:-1]]
    (tmp_path / "list.txt").write_text("\n".join(names) + "\n\n")
    extract.run(str(tmp_path / "list.txt"), tmp_path / "f.npy", model=str(run), num_processes=1)
    found = feature_file.read(tmp_path / "f.npy")
    assert found.ids == names
    torch.testing.assert_close(torch.tensor(found.features), loaded(run, [Path(n) for n in names]), rtol=1e-5, atol=1e-6)


def test_a_list_is_of_paths_below_its_own_folder_and_of_nothing_else(run, images, tmp_path, monkeypatch):
    (tmp_path / "lists").mkdir()
    for name in ("a.jpg", "#b.jpg"):
        (tmp_path / "lists" / name).write_bytes(next(images.glob("*.jpg")).read_bytes())
    (tmp_path / "lists" / "list.txt").write_text("a.jpg\n\n# a remark\na.jpg\n#b.jpg\n")
    monkeypatch.chdir(tmp_path)
    outcome = extract.run("lists/list.txt", Path("f.npy"), model=str(run), num_processes=1, max_rejects=0.5)
    assert feature_file.read(Path("f.npy")).ids == ["a.jpg", "a.jpg", "#b.jpg"]
    assert [reject["key"] for reject in outcome.rejects] == ["# a remark"]


def test_shards_give_the_features_of_the_images_by_their_names(run, images, shard_dir, tmp_path):
    extract.run(str(images), tmp_path / "folder.npy", model=str(run), num_processes=1)
    extract.run(str(shard_dir), tmp_path / "shards.npy", model=str(run), num_processes=1)
    folder, shards = rows_of(tmp_path / "folder.npy"), rows_of(tmp_path / "shards.npy")
    assert set(folder) == set(shards)
    for name, feature in folder.items():
        np.testing.assert_allclose(shards[name], feature, atol=1e-6)


def frames(folder: Path) -> list[np.ndarray]:
    """Two frames of a video, BGR, whose crops all differ."""
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (2, 12, 16, 3), dtype=np.uint8)
    made = [cv2.resize(small, (160, 120), interpolation=cv2.INTER_NEAREST) for small in noise]
    for number, frame in enumerate(made, 1):
        assert cv2.imwrite(str(folder / f"{number:06}.png"), frame)
    return made


def test_boxes_of_a_tracker_are_cut_out_of_their_frames(run, tmp_path):
    made = frames(tmp_path / "frames")
    lines = ["2,7,10,20,30,60,0.9,-1,-1,-1", "1,7,0,0,40,80", "1,3,100.4,30.2,70,95", "2,9,-500,0,20,20"]
    (tmp_path / "boxes.txt").write_text("\n".join(lines))
    options: Any = {"model": str(run), "boxes": tmp_path / "boxes.txt", "num_processes": 1, "max_rejects": 0.5}
    outcome = extract.run(str(tmp_path / "frames"), tmp_path / "f.parquet", **options)
    found = feature_file.read(tmp_path / "f.parquet")
    assert found.ids == ["000001.png:3", "000001.png:7", "000002.png:7"]
    assert found.columns == {"frame": [1, 1, 2], "track": [3, 7, 7]}
    crops = [made[0][30:125, 100:170], made[0][0:80, 0:40], made[1][20:80, 10:40]]
    ours = package.load(run, device="cpu").features([np.ascontiguousarray(crop[..., ::-1]) for crop in crops])
    torch.testing.assert_close(torch.tensor(found.features), ours, rtol=1e-5, atol=1e-6)
    assert [(reject["key"], reject["kind"]) for reject in outcome.rejects] == [("000002.png:9", "outside of its frame")]
    assert outcome.rejects[0]["reason"] == "its box is outside of the frame, 120 pixels high and 160 wide"


def test_a_part_of_boxes_takes_its_frames_along(tmp_path):
    frames(tmp_path / "frames")
    (tmp_path / "boxes.txt").write_text("1,1,0,0,10,10\n2,1,5,5,20,20\n2,2,0,0,9,9\n")
    whole = open_images(str(tmp_path / "frames"), boxes=tmp_path / "boxes.txt")
    part = whole.part(range(1, 3))
    assert part.ids == whole.ids[1:] == ["000002.png:1", "000002.png:2"]
    assert part.pixels(0).shape == (20, 20, 3)
    np.testing.assert_array_equal(part.pixels(1), whole.pixels(2))


# --- processes, kills ---


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 300 images and one that is none."""
    folder = tmp_path_factory.mktemp("many")
    rng = np.random.default_rng(0)
    for number in range(300):
        small = rng.integers(0, 256, (6, 3, 3), dtype=np.uint8)
        assert cv2.imwrite(str(folder / f"{number:03}.jpg"), cv2.resize(small, (48, 96)))
    (folder / "150.jpg").write_bytes(b"\xff\xd8 no image")
    return folder


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_number_of_processes_changes_no_byte(run, many, tmp_path):
    for processes in (1, 3, None):
        extract.run(str(many), tmp_path / f"{processes}.parquet", model=str(run), num_processes=processes)
    assert len({digest(tmp_path / f"{processes}.parquet") for processes in (1, 3, None)}) == 1


def test_what_is_there_is_not_computed_again(run, many, tmp_path, monkeypatch):
    written: list[str] = []
    compute = extract.write_part

    def counting(task: Any) -> int:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(task.path.name)
        return compute(task)

    monkeypatch.setattr(extract, "write_part", counting)
    with pytest.raises(Stopped, match="run the same command again"):
        extract.run(str(many), tmp_path / "f.npy", model=str(run), num_processes=1)
    assert sorted(path.name for path in (tmp_path / "f.npy.partial").glob("part-*")) == sorted(written)
    monkeypatch.setattr(extract, "write_part", compute)
    seen: list[tuple[int, int]] = []
    extract.run(str(many), tmp_path / "f.npy", model=str(run), num_processes=1, progress=lambda *at: seen.append(at))
    assert seen[0] == (3 * 64, 300)
    assert seen[-1] == (300, 300)


@pytest.mark.slow
def test_killed_five_times_it_ends_with_the_same_bytes(run, many, tmp_path):
    undisturbed, killed = tmp_path / "undisturbed.parquet", tmp_path / "killed.parquet"
    assert personmae("extract", many, undisturbed, "--model", run).returncode == 0
    for number in range(5):
        process = started(many, killed, "--model", run, "--processes", "2" if number == 2 else "1")
        wait_for_parts(tmp_path / "killed.parquet.partial", number, process)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not killed.exists()
    assert started(many, killed, "--model", run, "--processes", "2").wait(300) == 0
    assert digest(killed) == digest(undisturbed)
    assert digest(extract.rejects_beside(killed)) == digest(extract.rejects_beside(undisturbed))
    assert not (tmp_path / "killed.parquet.partial").exists()


def started(*args: str | Path) -> warm.Process:
    """``personmae extract ARGS`` with a group of its own for all of its processes."""
    return warm.start(["-m", "personmae", "extract", *args], env=small_runs.environment(), start_new_session=True)


def wait_for_parts(folder: Path, number: int, process: warm.Process) -> None:
    """Until the plan and at least so many of the five parts are there."""
    deadline = time.monotonic() + 300
    while not ((folder / "plan.json").exists() and len(list(folder.glob("part-*.npz"))) >= number):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_after_a_kill_in_the_last_moment_nothing_is_left_to_do(run, many, tmp_path, monkeypatch):
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(extract.shutil, "rmtree", killed)
        with pytest.raises(Stopped, match="interrupted"):
            extract.run(str(many), tmp_path / "f.npy", model=str(run), num_processes=1)
    before = digest(tmp_path / "f.npy")
    assert extract.run(str(many), tmp_path / "f.npy", model=str(run), num_processes=1).was_complete
    assert digest(tmp_path / "f.npy") == before
    assert sorted(os.listdir(tmp_path)) == ["f.ids.txt", "f.npy", "f.npy.rejects.jsonl"]


def test_an_unfinished_extraction_of_another_model_is_not_gone_on_with(run, many, tmp_path):
    other = small_runs.make(tmp_path / "other", "neck")
    folder = tmp_path / "f.npy.partial"
    plan = extract.make_plan(package.load(run), extract.Settings(str(run), "cpu", "fp32", 64, 1), open_images(str(many)))
    folder.mkdir()
    (folder / "plan.json").write_text(json.dumps(plan.record))
    with pytest.raises(UserError, match="of other images or another model: model="):
        extract.run(str(many), tmp_path / "f.npy", model=str(other), num_processes=1)
    assert [path.name for path in folder.iterdir()] == ["plan.json"]


def test_each_process_takes_its_own_gpu():
    assert [gpu_of(f"ForkServerProcess-{number}", 2) for number in (1, 2, 3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert gpu_of("MainProcess", 2) == "cuda:0"


# --- what is wrong ---


def test_an_image_that_cannot_be_read_is_left_out_and_listed(run, many, tmp_path):
    result = personmae("extract", many, tmp_path / "f.npy", "--model", run)
    assert result.returncode == 0, result.stderr
    assert "1 left out, listed in" in result.stdout
    (reject,) = [json.loads(line) for line in (tmp_path / "f.npy.rejects.jsonl").read_text().splitlines()]
    assert reject["key"] == "150.jpg"
    found = feature_file.read(tmp_path / "f.npy")
    assert len(found.ids) == len(found.features) == 299
    assert "150.jpg" not in found.ids
    at = found.ids.index("151.jpg")
    torch.testing.assert_close(torch.tensor(found.features[at : at + 1]), loaded(run, [many / "151.jpg"]), rtol=1e-5, atol=1e-6)


def test_too_many_of_them_end_it_and_a_larger_share_goes_on(run, many, tmp_path):
    with pytest.raises(TooManyRejects, match="1 of 300 are"):
        extract.run(str(many), tmp_path / "f.npy", model=str(run), num_processes=1, max_rejects=0.001)
    assert not (tmp_path / "f.npy").exists()
    assert "150.jpg" in (tmp_path / "f.npy.partial" / "rejects.jsonl").read_text()
    seen: list[tuple[int, int]] = []
    extract.run(
        str(many), tmp_path / "f.npy", model=str(run), num_processes=1, max_rejects=1, progress=lambda *at: seen.append(at)
    )
    assert seen[0] == (300, 300)


def test_bad_input_is_one_line_and_code_78(run, images, tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.csv").write_text("x")
    (tmp_path / "no_images").mkdir()
    (tmp_path / "no_images" / "a.jpg").write_text("this is text")
    (tmp_path / "there.npy").write_text("x")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "absent.txt").write_text("a.jpg\nb.jpg\n")
    (tmp_path / "boxes.txt").write_text("1,2,3\n")
    unfinished = small_runs.make(tmp_path / "unfinished", "bnneck", total_steps=9)
    frames(tmp_path / "frames")
    (tmp_path / "videos").mkdir()
    for video in ("a", "b"):
        frames(tmp_path / "videos" / video)
    before = sorted(os.listdir(tmp_path))
    out = tmp_path / "f.npy"
    cases: dict[tuple[Any, ...], str] = {
        (tmp_path / "texts", out, "--model", run): "holds none next to 1 .csv",
        (tmp_path / "no_images", out, "--model", run): "images that can be decoded are required. All 1 of",
        (tmp_path / "nothing", out, "--model", run): "is not there",
        (images, tmp_path / "there.npy", "--model", run): "there.npy exists",
        (images, "/proc/f.npy", "--model", run): "a place that can be written to is required",
        (images, tmp_path / "f.txt", "--model", run): f"name it {tmp_path / 'f.parquet'}",
        (images, out, "--model", unfinished): "must be a finished run and is at step 3 of 9",
        (images, out, "--model", tmp_path / "nothing"): "nothing does not exist",
        (images, out, "--model", run, "--column", "x"): "--column is of MDS shards and parquet files. ",
        (tmp_path / "absent.txt", out, "--model", run, "--column", "x"): "absent.txt is a list: leave it out",
        (tmp_path / "empty.txt", out, "--model", run): "is empty",
        (tmp_path / "absent.txt", out, "--model", run): "None is there, such as a.jpg",
        (tmp_path / "frames", out, "--model", run, "--boxes", tmp_path / "boxes.txt"): "line 1, must begin with FRAME,TRACK",
        (tmp_path / "videos", out, "--model", run, "--boxes", tmp_path / "boxes.txt"): "have one number",
        (images, out, "--model", run, "--max-rejects", "2"): "--max-rejects must be a share",
    }
    for arguments, expected in cases.items():
        assert expected in refusal(capsys, "extract", *arguments), expected
    assert sorted(os.listdir(tmp_path)) == before


def test_a_source_that_goes_away_ends_the_work_instead_of_rejecting_all(images, tmp_path):
    copy = tmp_path / "images"
    copy.mkdir()
    (copy / "a.jpg").write_bytes(next(images.glob("*.jpg")).read_bytes())
    found = open_images(str(copy))
    (copy / "a.jpg").unlink()
    copy.rmdir()
    with pytest.raises(UserError, match="has gone while it was read"):
        found.pixels(0)
