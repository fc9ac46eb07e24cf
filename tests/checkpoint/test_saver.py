"""When a state is saved, what a signal ends, and what the end of a run saves."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from personmae import dist
from personmae.checkpoint import portable
from personmae.checkpoint.portable import Checkpoint
from personmae.checkpoint.saver import Saver
from personmae.checkpoint.writer import Schedule, Writer
from personmae.errors import Diverged, Stopped
from personmae.monitor.rank_metrics import RankMetrics

pytestmark = pytest.mark.usefixtures("restore_signals")
TOTAL = 10


class Run:
    """A run of ten steps on one rank; ``skipped`` are the steps that change nothing."""

    def __init__(self, run_dir: Path, schedule: Schedule, *, first_step: int = 0, skipped: tuple[int, ...] = ()):
        self.run_dir, self.step, self.skipped = run_dir, first_step, skipped
        self.stop, self.metrics = dist.StopSignal(), RankMetrics("finetune")
        self.writer = Writer(run_dir, keep_last=9)
        options = {"run_dir": str(run_dir), "first_step": first_step, "total_steps": TOTAL}
        self.saver = Saver(
            self.writer, schedule, self.stop, self.metrics, save=self.save, counts=lambda: self.step not in skipped, **options
        )

    def save(self) -> None:
        tensors = {"student": {"w": torch.full((2,), float(self.step))}}
        self.writer.save(Checkpoint(self.step, tensors, {"step": self.step}), wait=True)

    def go(self, to: int) -> None:
        while self.step < to:
            self.step += 1
            self.saver.at(self.step, silent=False)

    @property
    def saved(self) -> list[int]:
        return portable.local_steps(self.run_dir)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def begin(schedule: Schedule | None = None, **options) -> Run:
        runs.append(Run(tmp_path / "run", schedule or Schedule(every_steps=4), **options))
        return runs[-1]

    yield begin
    for run in runs:
        run.saver.close()
        run.metrics.close(lambda: True)


def test_a_state_is_saved_at_its_steps_and_the_last_one_at_the_end_once(start):
    run = start()
    run.go(TOTAL)
    assert run.saved == [4, 8]
    run.saver.end(run.step)
    assert run.saved == [4, 8, 10]
    assert portable.newest(run.run_dir) == portable.folder(run.run_dir) / "step-00000010"


def test_an_end_that_was_just_saved_is_not_saved_again(start, monkeypatch):
    run = start(Schedule(every_steps=5))
    run.go(TOTAL)
    assert run.saved == [5, 10]
    monkeypatch.setattr(run.writer, "save", lambda *_, **__: pytest.fail("it is saved twice"))
    run.saver.end(run.step)


def test_a_state_is_saved_when_its_time_has_come(start, monkeypatch):
    run = start(Schedule(every_steps=1000, every_seconds=60.0))
    run.go(2)
    assert run.saved == []
    now = run.writer._saved_at
    monkeypatch.setattr("personmae.checkpoint.writer.time.monotonic", lambda: now + 61.0)
    run.go(3)
    assert run.saved == [3]
    run.go(4)
    assert run.saved == [3]


def test_a_state_that_is_due_waits_for_a_step_that_changes_something(start):
    run = start(skipped=(4, 5))
    run.go(5)
    assert run.saved == []
    run.go(6)
    assert run.saved == [6]
    run.go(8)
    assert run.saved == [6, 8]


def test_the_end_is_saved_though_its_step_was_skipped(start):
    run = start(Schedule(every_steps=1000), skipped=(TOTAL,))
    run.go(TOTAL)
    run.saver.end(run.step)
    assert run.saved == [TOTAL]


def test_a_run_that_diverges_at_its_end_saves_nothing(start):
    run = start(Schedule(every_steps=1000))
    run.go(TOTAL)

    def diverged() -> bool:
        raise Diverged("the gradient was not finite")

    run.saver._counts = diverged
    with pytest.raises(Diverged):
        run.saver.end(run.step)
    assert run.saved == []


def test_a_signal_saves_the_state_and_ends_the_run_at_its_step(start):
    run = start()
    run.go(5)
    run.stop.requested = True
    with pytest.raises(Stopped) as stopped:
        run.go(6)
    assert run.saved == [4, 6]
    assert str(stopped.value) == f"at step 6 of 10, state saved in {run.run_dir}. Run this again to go on"
    assert not run.writer.busy


def test_a_signal_that_another_rank_has_got_ends_this_one_too(start, monkeypatch):
    run = start()
    monkeypatch.setattr(dist, "any_ranks", lambda *flags: (True, *flags[1:]))
    with pytest.raises(Stopped, match="at step 1 of 10, state saved"):
        run.go(1)
    assert run.saved == [1]


def test_before_the_first_step_there_is_nothing_to_save(start):
    run = start()
    run.stop.requested = True
    with pytest.raises(Stopped, match="at step 0 of 10, nothing to save yet"):
        run.saver.at(0, silent=False)
    assert run.saved == []


def test_a_resumed_run_that_is_stopped_at_once_has_its_state_already(start):
    run = start(first_step=3)
    run.stop.requested = True
    with pytest.raises(Stopped, match="at step 3 of 10, state saved in"):
        run.saver.at(3, silent=False)
    assert run.saved == []  # that of step 3 lies where it came from


def test_a_stop_after_a_skipped_step_keeps_what_was_saved_before_it(start):
    run = start(skipped=(6,))
    run.go(5)
    run.stop.requested = True
    with pytest.raises(Stopped, match="at step 6 of 10, state saved in"):
        run.go(6)
    assert run.saved == [4]


def test_a_stop_within_other_work_says_which(start):
    run = start()
    run.go(5)
    with pytest.raises(Stopped, match=r"^after a clustering, at step 5 of 10, state saved in"):
        run.saver.stop(5, during="after a clustering")
    assert run.saved == [4, 5]


def test_a_signal_at_the_last_step_leaves_the_end_to_its_program(start):
    run = start()
    run.go(TOTAL - 1)
    run.stop.requested = True
    run.step = TOTAL
    run.saver.at(TOTAL, silent=False)
    run.saver.end(TOTAL)
    assert run.saved == [4, 8, 10]


@pytest.mark.parametrize("silent", [True, False])
def test_whether_people_have_seen_nothing_is_agreed_on_with_the_rest(start, silent):
    assert start().saver.at(0, silent=silent) is silent


def test_a_rank_without_a_writer_agrees_and_waits_for_the_others(tmp_path):
    stop, metrics, saved = dist.StopSignal(), RankMetrics("finetune"), list[int]()
    saver = Saver(
        None,
        Schedule(every_steps=2, every_seconds=0.0),
        stop,
        metrics,
        save=lambda: saved.append(1),
        counts=lambda: True,
        run_dir=str(tmp_path),
        first_step=0,
        total_steps=TOTAL,
    )
    for step in range(1, 5):
        saver.at(step, silent=False)
    saver.end(5)
    saver.close()
    metrics.close(lambda: True)
    assert len(saved) == 3  # a collective of all ranks, by steps alone: time is the first rank's
