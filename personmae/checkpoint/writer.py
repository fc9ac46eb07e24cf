"""Keeping a run's checkpoints beside its step loop: when to save, the threads that write and upload, what to delete.

The loop waits for the copy to host memory alone. One thread writes and commits that copy. Another uploads what is committed,
from the disk, so a slow or absent store never holds up the next save.
"""

import copy
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch.distributed as tdist
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from personmae import dist
from personmae.checkpoint import commit, portable, remote
from personmae.checkpoint.host_copy import HostCopy
from personmae.checkpoint.portable import Checkpoint
from personmae.system.retry import Patience, retry

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOGETHER = timedelta(minutes=30)  # for which the ranks that have written wait for the others
_LAST_WORD_SECONDS = 1.0  # for an upload that waits to be tried again to say that it is given up


@dataclass(frozen=True, slots=True)
class Schedule:
    """When a state is saved: at multiples of steps, which all ranks know, and after a time, which one clock must decide."""

    every_steps: int
    every_seconds: float | None = None
    keep_every: int | None = None  # a step that is kept for good must be saved

    def by_step(self, step: int) -> bool:
        """Whether the state after ``step`` steps is saved."""
        return step % self.every_steps == 0 or (self.keep_every is not None and step % self.keep_every == 0)

    def by_time(self, seconds: float) -> bool:
        """Whether to save ``seconds`` after the last time."""
        return self.every_seconds is not None and seconds >= self.every_seconds


def join_ranks(run_dir: str | Path) -> dict[str, Any]:
    """Arguments of ``Writer`` with which all ranks write each checkpoint together. Called by all ranks together.

    Empty where there is one rank, or where a host does not see the first one's ``run_dir``: then the first must write alone.
    """
    if not tdist.is_initialized() or tdist.get_world_size() == 1:
        return {}
    token = dist.from_first_rank(uuid.uuid4().hex)  # never looked up before: a network file system remembers what is absent
    mark = Path(run_dir) / f".seen-by-all-{token}"
    if dist.is_first():
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    dist.barrier()
    blind = dist.any_rank(not mark.exists())
    if dist.is_first():
        mark.unlink()
    if blind:
        return {}
    group = cast("tdist.ProcessGroup", tdist.new_group(backend="gloo", timeout=_TOGETHER))
    return {"rank": tdist.get_rank(), "world_size": tdist.get_world_size(), "barrier": lambda: tdist.barrier(group)}


class CheckpointCounters:
    """What a writer counts, by the names under which Prometheus knows it, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        prefix = "personmae"
        self.seconds = Histogram(
            f"{prefix}_checkpoint_duration_seconds",
            "time of a stage: wait and snapshot hold up the step loop, persist and upload do not",
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.bytes = Counter(f"{prefix}_checkpoint_bytes", "bytes committed to the run directory", registry=registry)
        self.failures = Counter(
            f"{prefix}_checkpoint_failures", "stages that failed, each try of an upload", ["stage"], registry=registry
        )
        self.last_time = Gauge(
            f"{prefix}_last_checkpoint_timestamp_seconds", "when the last one was committed", registry=registry
        )
        self.last_step = Gauge(f"{prefix}_last_checkpoint_step", "the step of the last one", registry=registry)
        for stage in ("snapshot", "persist", "upload", "prune"):
            self.failures.labels(stage)  # a series that begins at 1 has no increase

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Observe a stage that succeeds, count one that fails."""
        start = time.monotonic()
        try:
            yield
        except BaseException:
            self.failures.labels(stage).inc()
            raise
        self.seconds.labels(stage).observe(time.monotonic() - start)


class Writer:
    """Saves the states of a run without holding it up. Only the first rank has one, unless all write their parts.

    ``upload_to`` is an object store that gets a copy of every committed checkpoint, or None. ``resumed`` is the checkpoint from
    which the run goes on: it is never deleted before ``keep_last`` newer ones are committed. What lies beyond it, or all that
    is there where a run starts anew, was passed over: with the first commit it is moved to ``commit.PASSED_OVER``.

    With ``world_size`` above one, all ranks have a writer over a shared directory, and ``barrier`` waits for all of them on a
    process group that nothing else uses, for it is called from a thread. See ``join_ranks``. Each rank then saves tensors of
    its own and the same kinds as the others, be it without a tensor.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        keep_last: int,
        keep_every: int | None = None,
        upload_to: str | None = None,
        resumed: Path | None = None,
        retry_seconds: float = 600.0,
        close_seconds: float = 120.0,
        rank: int = 0,
        world_size: int = 1,
        barrier: Callable[[], object] = lambda: None,
    ):
        self.counters = CheckpointCounters()
        self._run_dir, self._upload_to = Path(run_dir), upload_to.rstrip("/") if upload_to else None
        self._keep_last, self._keep_every = keep_last, keep_every
        self._retry_seconds, self._close_seconds = retry_seconds, close_seconds
        self._parts: dict[str, Any] = {"rank": rank, "world_size": world_size, "barrier": barrier}
        self._is_first = rank == 0
        resumed = commit.settle(resumed) if resumed and self._is_first else resumed
        self._resumed = (portable.step_of(resumed.name) or 0) if resumed else 0
        self._own: set[int] = set()  # steps that this writer has committed
        self._logged: set[str] = set()  # what could not be deleted or moved: it is named once
        self._host_copy, self._saved_at = HostCopy(), time.monotonic()
        self._writing: threading.Thread | None = None
        self._error: BaseException | None = None
        self._changed = threading.Condition()  # guards what follows
        self._queue: list[tuple[int, Path]] = []
        self._in_upload: int | None = None
        self._closing = self._given_up = False
        self._uploading: threading.Thread | None = None
        if self._upload_to and self._is_first:
            # A daemon: what a store does must not keep a process from ending.
            self._uploading = threading.Thread(target=self._upload_all, name="checkpoint upload", daemon=True)
            self._uploading.start()
            if resumed:  # it may not have got there before the run was cut short
                self._enqueue(self._resumed, resumed)

    @property
    def busy(self) -> bool:
        """Whether a save would wait for the one before."""
        return self._writing is not None and self._writing.is_alive()

    @property
    def seconds_since_save(self) -> float:
        """Seconds since the last save began, or since the start."""
        return time.monotonic() - self._saved_at

    def save(self, state: Checkpoint, *, wait: bool = False) -> float:
        """Copy a state to host memory and have it written. With ``wait``, return once it is committed to the run directory.

        Returns the seconds for which the caller was held up.

        Raises:
            OSError: this state, with ``wait``, or the one before could not be written. Nothing is saved from then on.
        """
        self._saved_at = time.monotonic()
        self._finish_writing()
        self.counters.seconds.labels("wait").observe(self.seconds_since_save)
        with self.counters.time("snapshot"):
            self._host_copy.take(state.tensors)
            record = copy.deepcopy(state.state)
        self._writing = threading.Thread(target=self._write, args=(state.step, record), name="checkpoint write")
        self._writing.start()
        if wait:
            self._finish_writing()
        return self.seconds_since_save

    def close(self) -> None:
        """Wait until all is written, and for a bounded time until all is uploaded. After a Ctrl-C that ends at once, not that.

        Raises:
            OSError: the last state could not be written.
        """
        seconds = 0.0 if isinstance(sys.exception(), KeyboardInterrupt) else self._close_seconds
        try:
            self._finish_writing()
        finally:
            self._finish_uploading(seconds)
        if self._own and self._is_first:
            self._prune()

    # --- the thread that writes ---

    def _finish_writing(self) -> None:
        if self._writing:
            self._writing.join()
        if self._error:
            raise self._error

    def _write(self, step: int, record: dict[str, Any]) -> None:
        try:
            with self.counters.time("persist"):
                passed_over = not self._is_ours(step)
                path = commit.commit(self._run_dir, step, self._host_copy, record, **self._parts, keep_earlier=passed_over)
            if self._is_first:
                self._note_commit(step, path)
                self._prune()
        except BaseException as error:  # raised where the run can end: at the next save, or at the close
            self._error = error

    def _note_commit(self, step: int, path: Path) -> None:
        self._own.add(step)
        self.counters.bytes.inc(sum(file.stat().st_size for file in path.iterdir()))
        self.counters.last_time.set_to_current_time()
        self.counters.last_step.set(step)
        if self._upload_to:
            self._enqueue(step, path)

    def _is_ours(self, step: int) -> bool:
        """Whether a step is of the line that this run goes on with."""
        return step <= self._resumed or step in self._own

    def _prune(self) -> None:
        with self._changed:
            needed = {self._in_upload, *(step for step, _ in self._queue)}
        try:
            steps = portable.local_steps(self._run_dir)
        except OSError as error:
            self._log_left({str(self._run_dir): error})
            return
        moved, unmoved = commit.set_aside(self._run_dir, [step for step in steps if not self._is_ours(step)])
        commit.log_moved([str(path) for path in moved])
        undeleted = commit.delete(self._run_dir, [step for step in self._surplus(steps) if step not in needed])
        self._log_left({str(path): error for path, error in (unmoved | undeleted).items()})

    def _log_left(self, failures: Mapping[str, Exception]) -> None:
        """Count what could not be deleted or moved, and name each once. It is tried again after the next save."""
        self.counters.failures.labels("prune").inc(len(failures))
        for path, error in failures.items():
            if path not in self._logged:
                print(f"checkpoint {path} is no longer needed and is left: {error}", flush=True)
            self._logged.add(path)

    def _surplus(self, steps: list[int]) -> list[int]:
        line = [step for step in steps if self._is_ours(step)]
        return commit.surplus(steps, line, keep_last=self._keep_last, keep_every=self._keep_every)

    # --- the thread that uploads ---

    def _enqueue(self, step: int, path: Path) -> None:
        """Have a checkpoint uploaded in place of those that wait, but for those that are kept for good."""
        with self._changed:
            self._queue = [*(waiting for waiting in self._queue if self._for_good(waiting[0])), (step, path)]
            self._changed.notify_all()

    def _for_good(self, step: int) -> bool:
        return self._keep_every is not None and step % self._keep_every == 0

    def _upload_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closing)
                if not self._queue or self._given_up:
                    return
                self._in_upload, path = self._queue.pop(0)
            self._upload(self._in_upload, path)
            with self._changed:
                self._in_upload = None

    def _upload(self, step: int, path: Path) -> None:
        where, sent = f"{self._upload_to}/{portable.name_of(step)}", set[str]()

        def attempt() -> None:
            with self.counters.time("upload"):
                remote.send(self._upload_to or "", path, step, sent, anew=step in self._own)

        def pause(delay: float) -> bool:
            with self._changed:
                return not self._changed.wait_for(lambda: self._superseded(step), timeout=delay)

        def log(error: Exception, tries: int, delay: float) -> None:
            if tries == 0:
                print(f"checkpoint {where} is not uploaded yet: {error}. Trying again", flush=True)

        try:
            retry(attempt, Patience(remote.delays, seconds=self._retry_seconds, pause=pause, log=log))
        except Exception as error:  # whatever it is, the run goes on: the checkpoint is whole in the run directory
            print(f"checkpoint {where} is not uploaded: {error}. {path} is kept here", flush=True)
            return
        if step in self._own:
            self._prune_store()

    def _superseded(self, step: int) -> bool:
        return self._given_up or (bool(self._queue) and not self._for_good(step))

    def _prune_store(self) -> None:
        upload_to = self._upload_to or ""
        try:
            steps = remote.steps(upload_to)
        except Exception as error:  # each store's client has errors of its own. The next upload deletes
            self._log_left({upload_to: error})
            return
        failures: dict[str, Exception] = {}
        moved = []
        for step in steps:
            try:
                if not self._is_ours(step):
                    moved += filter(None, [remote.set_aside(upload_to, step)])
                elif step in self._surplus(steps):
                    remote.delete(upload_to, step)
            except Exception as error:
                failures[f"{upload_to}/{portable.name_of(step)}"] = error
        commit.log_moved(moved)
        self._log_left(failures)

    def _finish_uploading(self, seconds: float) -> None:
        if not self._uploading or self._given_up:
            return
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        try:
            self._uploading.join(seconds)
        finally:  # a Ctrl-C meanwhile ends the waiting for good
            with self._changed:
                self._given_up = True
                self._changed.notify_all()
        self._uploading.join(_LAST_WORD_SECONDS)
        if self._uploading.is_alive() or self._queue:
            kept = f"{portable.folder(self._run_dir)} keeps what is not"
            print(f"checkpoint: not all is uploaded to {self._upload_to} after {seconds:g} s. {kept}", flush=True)
