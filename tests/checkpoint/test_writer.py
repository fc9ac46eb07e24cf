"""Saving beside the step loop: what is waited for, what is kept, and that a store's failures end nothing."""

import shutil
import threading
from pathlib import Path

import pytest
from writers import make, opened, read_newest, sample, steps

from personmae.checkpoint import commit, host_copy, portable
from personmae.checkpoint import writer as writer_module
from personmae.checkpoint.writer import Schedule, Writer

# --- when ---


@pytest.mark.parametrize(
    ("options", "due"),
    [
        ({"every_steps": 4}, [4, 8, 12]),
        ({"every_steps": 4, "keep_every": 6}, [4, 6, 8, 12]),
    ],
)
def test_steps_are_due_at_multiples_and_where_they_are_kept_for_good(options, due):
    assert [step for step in range(1, 13) if Schedule(**options).by_step(step)] == due


def test_time_is_due_once_it_has_passed_and_never_where_none_is_set():
    assert [Schedule(1, every_seconds=5.0).by_time(seconds) for seconds in (0.0, 4.9, 5.0, 60.0)] == [False, False, True, True]
    assert not Schedule(1).by_time(1e9)


# --- writing ---


def test_a_save_returns_at_once_and_is_written_as_the_state_was(tmp_path):
    state = make(1)
    with opened(tmp_path) as writer:
        writer.save(state)
        state.tensors["student"]["w"].zero_()
        state.state["nested"]["step"] = "changed"
    saved = read_newest(tmp_path)
    assert saved.tensors["student"]["w"].tolist() == [1.0] * 4
    assert saved.state == {"step": 1, "seed": 3, "nested": {"step": 1}, "format": portable.FORMAT}


def test_a_second_save_waits_for_the_first_and_both_are_there(tmp_path, monkeypatch):
    gate, real = threading.Event(), host_copy._put
    monkeypatch.setattr(host_copy, "_put", lambda file, block: (gate.wait(10), real(file, block)))
    with opened(tmp_path) as writer:
        assert not writer.busy
        writer.save(make(1))
        assert writer.busy
        threading.Timer(0.3, gate.set).start()
        waited = writer.save(make(2))
        assert gate.is_set()
        assert waited > 0.2
        assert sample(writer, "last_checkpoint_step") in (1, 2)
        assert sample(writer, "checkpoint_duration_seconds_sum", stage="wait") > 0.2
    assert steps(tmp_path) == [1, 2]
    assert read_newest(tmp_path).tensors["student"]["w"].tolist() == [2.0] * 4


def test_a_save_that_is_waited_for_is_committed_when_it_returns(tmp_path):
    with opened(tmp_path) as writer:
        writer.save(make(1), wait=True)
        assert (sample(writer, "last_checkpoint_step"), writer.busy) == (1, False)
        assert read_newest(tmp_path).step == 1


def test_the_clock_of_timed_saves_starts_again_with_each(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(writer_module.time, "monotonic", lambda: now[0])
    with opened(tmp_path) as writer:
        now[0] += 7
        assert writer.seconds_since_save == 7
        writer.save(make(1), wait=True)
        now[0] += 2
        assert writer.seconds_since_save == 2


def test_what_is_measured_has_the_names_of_the_alerts(tmp_path):
    with opened(tmp_path) as writer:
        writer.save(make(1), wait=True)
        writer.save(make(2), wait=True)
    for stage in ("wait", "snapshot", "persist"):
        assert sample(writer, "checkpoint_duration_seconds_count", stage=stage) == 2
    size = sum(file.stat().st_size for file in (portable.folder(tmp_path) / "step-00000002").iterdir())
    assert sample(writer, "checkpoint_bytes_total") == 2 * size
    assert sample(writer, "last_checkpoint_step") == 2
    assert sample(writer, "last_checkpoint_timestamp_seconds") > 1e9
    assert sample(writer, "checkpoint_failures_total", stage="persist") == 0


@pytest.mark.parametrize("wait", [True, False])
def test_a_disk_that_cannot_be_written_ends_the_run_at_the_next_save_and_keeps_the_last_state(tmp_path, monkeypatch, wait):
    writer = Writer(tmp_path, keep_last=2)
    writer.save(make(1), wait=True)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(host_copy, "_put", full)
    if not wait:
        writer.save(make(2))
    with pytest.raises(OSError, match="No space left") as caught:
        writer.save(make(2 if wait else 3), wait=wait)
    assert caught.value.filename.endswith(".partial-step-00000002/student.safetensors")
    with pytest.raises(OSError, match="No space left"):
        writer.close()
    assert read_newest(tmp_path).step == 1
    assert [path.name for path in portable.folder(tmp_path).glob(".partial-*")] == []
    assert sample(writer, "checkpoint_failures_total", stage="persist") == 1


# --- what is kept ---


def test_the_last_ones_and_every_nth_are_kept(tmp_path):
    with opened(tmp_path, keep_every=4) as writer:
        for step in range(1, 11):
            writer.save(make(step))
    assert steps(tmp_path) == [4, 8, 9, 10]


def test_one_that_cannot_be_deleted_keeps_no_other_from_being_deleted_and_is_named_once(tmp_path, monkeypatch, capsys):
    real = shutil.rmtree

    def busy(path: Path, *, ignore_errors: bool = False) -> None:
        if path.name == "step-00000001":
            raise OSError(39, "Directory not empty", str(path))  # as where another host reads what lies on NFS
        real(path, ignore_errors=ignore_errors)

    with opened(tmp_path, keep_last=1) as writer:
        writer.save(make(1), wait=True)
        with monkeypatch.context() as patch:
            patch.setattr(commit.shutil, "rmtree", busy)
            for step in (2, 3, 4):
                writer.save(make(step), wait=True)
        assert (sample(writer, "last_checkpoint_step"), steps(tmp_path)) == (4, [1, 4])
        assert read_newest(tmp_path).step == 4
        assert sample(writer, "checkpoint_failures_total", stage="prune") == 3
        left = f"{portable.folder(tmp_path)}/step-00000001 is no longer needed and is left: [Errno 39]"
        assert capsys.readouterr().out.count(left) == 1
        writer.save(make(5), wait=True)
        assert steps(tmp_path) == [5]


def test_one_rank_alone_has_nobody_to_write_with(tmp_path):
    assert writer_module.join_ranks(tmp_path / "run") == {}
    assert not (tmp_path / "run").exists()


def spoil(run: Path, step: int) -> bytes:
    """Flip a bit of a checkpoint's weights; returns what they are now."""
    path = portable.folder(run) / portable.name_of(step) / "student.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return bytes(content)


def kept_aside(run: Path) -> dict[str, bytes]:
    """The weights of what was passed over, by the folder's name."""
    folders = (portable.folder(run) / "passed-over").iterdir()
    return {path.name: (path / "student.safetensors").read_bytes() for path in sorted(folders)}


def test_a_run_that_fell_back_keeps_where_it_came_from_and_what_it_passed_over(tmp_path, capsys):
    with opened(tmp_path, keep_last=3) as writer:
        for step in (10, 20, 30):
            writer.save(make(step))
    passed = {f"step-000000{step}": spoil(tmp_path, step) for step in (20, 30)}
    resumed = portable.newest(tmp_path)
    assert resumed is not None
    capsys.readouterr()
    with opened(tmp_path, resumed=resumed) as writer:
        assert steps(tmp_path) == [10, 20, 30]
        writer.save(make(25), wait=True)
        assert steps(tmp_path) == [10, 25]  # 20 is damaged: it must not count as one of two
        writer.save(make(30), wait=True)
        assert steps(tmp_path) == [25, 30]
    assert kept_aside(tmp_path) == passed
    output = capsys.readouterr().out
    assert output.count("kept, though this run does not go on from them") == 1
    assert all(output.count(f"passed-over/{name}") == 1 for name in passed)


def test_what_was_passed_over_is_kept_where_its_own_step_is_saved_anew(tmp_path):
    with opened(tmp_path) as writer:
        writer.save(make(10))
        writer.save(make(20))
    passed = spoil(tmp_path, 20)
    with opened(tmp_path, resumed=portable.newest(tmp_path)) as writer:
        writer.save(make(20))
    assert kept_aside(tmp_path) == {"step-00000020": passed}
    assert steps(tmp_path) == [10, 20]
    assert read_newest(tmp_path).step == 20


def test_a_replaced_one_that_is_damaged_too_is_kept(tmp_path):
    with opened(tmp_path) as writer:
        writer.save(make(10))
        writer.save(make(20))
    passed = spoil(tmp_path, 20)
    (portable.folder(tmp_path) / "step-00000020").rename(portable.folder(tmp_path) / ".old-step-00000020")
    with opened(tmp_path, resumed=portable.newest(tmp_path)) as writer:
        for step in (15, 20, 25):
            writer.save(make(step), wait=True)
    assert kept_aside(tmp_path) == {"step-00000020": passed}
    assert steps(tmp_path) == [20, 25]


@pytest.mark.parametrize("damaged_beside", [True, False])
def test_a_checkpoint_whose_replacement_was_cut_short_gets_its_name_back(tmp_path, damaged_beside):
    with opened(tmp_path) as writer:
        writer.save(make(5))
    path = portable.folder(tmp_path) / "step-00000005"
    path.rename(path.with_name(f".old-{path.name}"))
    if damaged_beside:
        path.mkdir()
    with opened(tmp_path, resumed=portable.newest(tmp_path)) as writer:
        assert portable.newest(tmp_path) == path
        writer.save(make(6))
    assert steps(tmp_path) == [5, 6]


def test_a_run_started_anew_keeps_what_was_there_aside_once_it_has_saved(tmp_path, capsys):
    with opened(tmp_path) as writer:
        writer.save(make(50))
        writer.save(make(60))
    before = {path.name: (path / "student.safetensors").read_bytes() for path in portable.folder(tmp_path).glob("step-*")}
    with opened(tmp_path, keep_last=1) as writer:
        assert steps(tmp_path) == [50, 60]
        writer.save(make(60), wait=True)  # of a step that is there
        assert steps(tmp_path) == [60]
        writer.save(make(70), wait=True)
    assert steps(tmp_path) == [70]
    assert kept_aside(tmp_path) == before
    assert "kept, though this run does not go on from them" in capsys.readouterr().out
