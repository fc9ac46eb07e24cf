"""When a run's state is saved, and how a run ends that is to stop: the same for all programs, and agreed by all ranks."""

from collections.abc import Callable
from typing import NoReturn

from personmae import dist
from personmae.checkpoint.writer import Schedule, Writer
from personmae.errors import Stopped
from personmae.monitor.rank_metrics import RankMetrics


class Saver:
    """Saves a run's state when that is due: by steps, by time, after a signal, at the end.

    All ranks call every method together, at step boundaries. What is due is agreed on: time is that of the first rank's clock,
    and a signal may have reached one rank alone. ``writer`` is there on ranks that write, and is closed here. ``save`` has it
    write a state. ``counts`` says whether the last step changed the parameters, and may raise Diverged: after a skipped step
    nothing is saved before the end.
    """

    def __init__(
        self,
        writer: Writer | None,
        schedule: Schedule,
        stop: dist.StopSignal,
        metrics: RankMetrics,
        *,
        save: Callable[[], None],
        counts: Callable[[], bool],
        run_dir: str,
        first_step: int,
        total_steps: int,
    ):
        self.writer, self._schedule, self._stop, self._metrics = writer, schedule, stop, metrics
        self._save, self._counts = save, counts
        self._run_dir, self._total_steps = run_dir, total_steps
        self._saved, self._due = first_step, False

    def at(self, step: int, *, silent: bool) -> bool:
        """Save the state after ``step`` steps where that is due. Returns whether ``silent`` is true on any rank.

        Raises:
            Stopped: a signal asked for it, and there are steps left. The state is saved.
            Diverged: as ``counts`` does.
            OSError: the state before this one could not be written.
        """
        stopping, timed, silent = dist.any_ranks(self._stop.requested, self._is_time(), silent)
        self._due |= step > self._saved and (timed or self._schedule.by_step(step))
        if stopping and step < self._total_steps:
            self.stop(step)
        if self._due and self._counts():
            self._save_now(step)
        return silent

    def stop(self, step: int, during: str = "") -> NoReturn:
        """End the run after ``step`` steps. ``during`` says what was under way, where that was no step.

        Raises:
            Stopped: always.
        """
        self._stop.settle()
        if step > self._saved and self._counts():
            self._save_now(step)
        self._finish(step)
        kept = f"state saved in {self._run_dir}" if self._saved else "nothing to save yet"
        where = f"{during}, at step" if during else "at step"
        raise Stopped(f"{where} {step} of {self._total_steps}, {kept}. Run this again to go on")

    def end(self, step: int) -> None:
        """Save the last state, also after a skipped step, and wait until it is written and uploaded.

        Raises:
            Diverged: as ``counts`` does.
            OSError: it could not be written.
        """
        self._counts()
        if step > self._saved:
            self._save_now(step)
        self._finish(step)

    def close(self) -> None:
        """Wait for what is being written, as ``Writer.close`` does."""
        if self.writer:
            self.writer.close()

    def _is_time(self) -> bool:
        """Whether the time has come by the first rank's clock. A save that would wait for the one before is put off."""
        if self.writer is None or self.writer.busy or not dist.is_first():
            return False
        return self._schedule.by_time(self.writer.seconds_since_save)

    def _save_now(self, step: int) -> None:
        self._metrics.beat("checkpoint", step)
        self._save()
        self._saved, self._due = step, False

    def _finish(self, step: int) -> None:
        """Wait on all ranks until the first has everything written and uploaded: a launcher ends it when another one ends."""
        self._metrics.beat("checkpoint", step)
        self.close()
        dist.barrier()
