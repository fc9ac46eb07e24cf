"""A run's log: a progress bar or plain lines, ``metrics.jsonl``, TensorBoard files, and the record of its set-up.

``rank_metrics.py`` has what goes to Prometheus.
"""

import contextlib
import json
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from personmae.monitor import environment, progress
from personmae.monitor.progress import EVERY_SECONDS, Pace, duration
from personmae.monitor.rank_metrics import RunNumbers
from personmae.system import files

METRICS: Final = "metrics.jsonl"
CLUSTERS: Final = "clusters.jsonl"  # a line for each clustering of an unsupervised run


class RunLog:
    """Rank 0's log. On other ranks every method does nothing.

    ``metrics.jsonl`` has one object per recorded step. A resumed run drops the lines beyond the step it resumes from and
    keeps the lines before it, so the file reads as if nothing had happened. More is displayed than recorded: the first
    step, and a line every ten seconds.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        is_first: bool,
        title: str,
        total_steps: int,
        first_step: int,
        numbers: RunNumbers | None = None,  # of the first rank, for Prometheus
    ):
        self._is_first, self._numbers = is_first, numbers
        if not is_first:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._dir = Path(run_dir)
        self._dir.mkdir(parents=True, exist_ok=True)
        path = self._dir / METRICS
        files.cut_lines(path, lambda record: first_step > 0 and record["step"] <= first_step)
        self._board = SummaryWriter(str(self._dir / "tensorboard"), purge_step=first_step or None)
        self._file = path.open("a", buffering=1, encoding="utf-8")
        self._title, self._total_steps, self._first_step = title, total_steps, first_step
        self._last_time, self._last_step, self._step = time.monotonic(), first_step, first_step
        self._pace = Pace(first_step)
        self._bar = self._start_bar(first_step)

    def _start_bar(self, first_step: int) -> tuple[Progress, Any] | None:
        console = Console()
        if not console.is_terminal:
            return None
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[values]}"),
        )
        bar = Progress(*columns, console=console)
        bar.start()
        return bar, bar.add_task(self._title, total=self._total_steps, completed=first_step, values="")

    def advance(self, step: int) -> None:
        """Move the bar. This is cheap enough for every step."""
        if self._is_first:
            self._step = step
            if self._bar:
                self._bar[0].update(self._bar[1], completed=step)

    def is_due(self) -> bool:
        """Whether nothing was displayed for ten seconds. Rank 0's clock decides, since the values come from all ranks."""
        return self._is_first and self._pace.seconds_since_mark >= EVERY_SECONDS

    def record(
        self, step: int, values: dict[str, float], *, images_per_step: int, constants: dict[str, float] | None = None
    ) -> None:
        """Write one record with the images per second since the last one, and display it without ``constants``."""
        if not self._is_first:
            return
        now = time.monotonic()
        rate = (step - self._last_step) * images_per_step / max(1e-9, now - self._last_time)
        self._last_time, self._last_step = now, step
        record = {"step": step, "time": time.time(), **values, **(constants or {}), "images_per_second": rate}
        self._file.write(files.to_json(record) + "\n")
        if self._numbers:
            self._numbers.record(step, values, rate)
        for name, value in record.items():
            if name not in ("step", "time"):
                self._board.add_scalar(name, value, step)
        self.display(step, values, images_per_step=images_per_step)

    @contextlib.contextmanager
    def pausing(self) -> Iterator[None]:
        """Leave the time spent within out of the recorded images per second."""
        start = time.monotonic()
        yield
        if self._is_first:
            self._last_time += time.monotonic() - start

    def display(self, step: int, values: dict[str, float], *, images_per_step: int) -> None:
        """Display a step with the rate and the time to go of the last minute, and record nothing."""
        if not self._is_first:
            return
        waited = self._pace.seconds_since_mark
        self._pace.mark(step)
        left = self._pace.left(self._total_steps)
        if step == self._first_step + 1:  # it sets up and compiles, so later ones take less
            pace = f"the first step took {waited:.1f} s"
        else:
            pace = f"{self._pace.rate * images_per_step:,.0f} images/s  {'?' if left is None else duration(left)} to go"
        if self._bar:  # a terminal is narrow: the rest is in the files
            self._bar[0].update(self._bar[1], completed=step, values=f"loss {values['loss']:.4g}  {pace}")
        else:
            shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            self.log(f"{self._title} {step}/{self._total_steps}  {shown}  {pace}")

    def log(self, text: str) -> None:
        """Log a line, above the bar where there is one."""
        if self._is_first:
            if self._bar:
                self._bar[0].console.print(text, markup=False, emoji=False)  # a run's name may have brackets
            else:
                progress.log(text)

    def close(self) -> None:
        """End the bar, flush the files, and record in ``run.json`` how the run ended, by the exception being raised."""
        if not self._is_first:
            return
        failure = sys.exception()
        try:
            with contextlib.ExitStack() as closing:  # each, though another may raise on a full disk
                closing.callback(self._board.close)
                closing.callback(self._file.close)
                if self._bar:
                    closing.callback(self._bar[0].stop)
        except BaseException as error:
            failure = failure or error
            raise
        finally:
            environment.end(self._dir, last_step=self._step, failure=failure)


def read_records(run_dir: str | Path) -> list[dict[str, float]]:
    """All records of a run's ``metrics.jsonl``. A null there stands for a number that was not finite."""
    lines = files.whole_lines(Path(run_dir) / METRICS)
    records: list[dict[str, float | None]] = [json.loads(line) for line in lines]
    return [{name: float("nan") if value is None else value for name, value in record.items()} for record in records]


def record_run(
    run_dir: str | Path, *, config_yaml: str, config_hash: str, seed: int, versions: dict[str, str], first_step: int
) -> None:
    """Write ``config.yaml`` and ``run.json``: what ran, on what, from which commit, and when."""
    directory = Path(run_dir)
    directory.mkdir(parents=True, exist_ok=True)
    files.replace(directory / "config.yaml", config_yaml)
    run = {
        "config_hash": config_hash,
        "seed": seed,
        "commit": environment.git_commit(),
        "versions": versions | {"python": platform.python_version()},
        "hardware": environment.describe_hardware(),
    }
    environment.begin(directory, run, first_step=first_step)
