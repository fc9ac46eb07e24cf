"""What a run reports: a progress bar or plain lines, ``metrics.jsonl``, TensorBoard files, and the record of its set-up.

Also how much arithmetic a picture needs, and how much a GPU could do. What Prometheus is told stands in meter.py.
"""

import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from personmae import files, sessions
from personmae.meter import RunNumbers
from personmae.progress import EVERY_SECONDS, Pace, duration, log

METRICS: Final = "metrics.jsonl"
CLUSTERS: Final = "clusters.jsonl"  # a line for each clustering of an unsupervised run


class RunLog:
    """Rank 0's reports; on other ranks every method does nothing.

    ``metrics.jsonl`` has one object per logged step. A resumed run drops the lines at or beyond the step it resumes from,
    so the file reads as if nothing had happened; the lines before are not written again. People see more than is recorded:
    the first step, and a line every ten seconds.
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
            TextColumn("{task.fields[note]}"),
        )
        bar = Progress(*columns, console=console)
        bar.start()
        return bar, bar.add_task(self._title, total=self._total_steps, completed=first_step, note="")

    def advance(self, step: int) -> None:
        """Move the bar; cheap enough for every step."""
        if self._is_first:
            self._step = step
            if self._bar:
                self._bar[0].update(self._bar[1], completed=step)

    def is_due(self) -> bool:
        """Whether people have seen nothing for ten seconds; rank 0's clock decides, and what is shown comes from all ranks."""
        return self._is_first and self._pace.seconds_since_mark >= EVERY_SECONDS

    def log(
        self, step: int, values: dict[str, float], *, images_per_step: int, constants: dict[str, float] | None = None
    ) -> None:
        """Write one record, with images per second since the last one, and show it; ``constants`` are written alone."""
        if not self._is_first:
            return
        now = time.monotonic()
        rate = (step - self._last_step) * images_per_step / max(1e-9, now - self._last_time)
        self._last_time, self._last_step = now, step
        record = {"step": step, "time": time.time(), **values, **(constants or {}), "images_per_second": rate}
        self._file.write(files.to_json(record) + "\n")
        if self._numbers:
            self._numbers.show(step, values, rate)
        for name, value in record.items():
            if name not in ("step", "time"):
                self._board.add_scalar(name, value, step)
        self.show(step, values, images_per_step=images_per_step)

    @contextlib.contextmanager
    def pausing(self) -> Iterator[None]:
        """What is done meanwhile takes no time from the steps, as far as their images per second are recorded."""
        start = time.monotonic()
        yield
        if self._is_first:
            self._last_time += time.monotonic() - start

    def show(self, step: int, values: dict[str, float], *, images_per_step: int) -> None:
        """Show a step with rate and time to go of the last minute; nothing is recorded."""
        if not self._is_first:
            return
        waited = self._pace.seconds_since_mark
        self._pace.mark(step)
        left = self._pace.left(self._total_steps)
        if step == self._first_step + 1:  # it sets up and compiles, so it says nothing of the others
            pace = f"the first step took {waited:.1f} s"
        else:
            pace = f"{self._pace.rate * images_per_step:,.0f} images/s  {'?' if left is None else duration(left)} to go"
        if self._bar:  # a terminal is narrow: the rest is in the files
            self._bar[0].update(self._bar[1], completed=step, note=f"loss {values['loss']:.4g}  {pace}")
        else:
            shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            self.say(f"{self._title} {step}/{self._total_steps}  {shown}  {pace}")

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._is_first:
            if self._bar:
                self._bar[0].console.print(text, markup=False, emoji=False)  # a run's name may have brackets
            else:
                log(text)

    def close(self) -> None:
        """End the bar, flush the files, and write into ``run.json`` how it ended, by the exception on its way."""
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
            sessions.end(self._dir, last_step=self._step, failure=failure)


def read_records(run_dir: str | Path) -> list[dict[str, float]]:
    """All records of a run's ``metrics.jsonl``; null there is a number that was not finite."""
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
        "commit": git_commit(),
        "versions": versions | {"python": platform.python_version()},
        "hardware": describe_hardware(),
    }
    sessions.begin(directory, run, first_step=first_step)


def git_commit() -> str | None:
    """The checkout's commit, with '+' when files differ from it; None outside a checkout."""
    where = Path(__file__).resolve().parent

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], cwd=where, capture_output=True, text=True, check=True, encoding="utf-8"
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def describe_hardware() -> dict[str, Any]:
    """Processor, cores, memory in bytes, and GPUs by name."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": _cpu_name(), "cores": os.cpu_count(), "memory_bytes": memory, "gpus": gpus}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def transformer_flops(num_tokens: int, dim: int, depth: int, mlp_ratio: float = 4.0, num_out: int | None = None) -> float:
    """Operations, two for a product and its sum, of a forward pass through ``depth`` blocks: matrix products alone.

    With ``num_out`` the last block computes only so many tokens, which attend to all.
    """

    def block(num_out: int) -> float:
        return 2.0 * ((3 * num_tokens + (1 + 2 * mlp_ratio) * num_out) * dim**2 + 2 * num_tokens * num_out * dim)

    return (depth - 1) * block(num_tokens) + block(num_tokens if num_out is None else num_out)


def pretrain_flops(
    *,
    num_visible: int,
    num_patches: int,
    patch_size: int,
    embed_dim: int,
    depth: int,
    decoder_depth: int,
    pixel_dim: int,
    feature_dim: int | None,
    identity_dim: int | None = None,
) -> float:
    """Operations that an image needs in a step of pre-training: student and decoders three times (forward, and backward as
    two), the teacher once. What activation checkpointing computes again is not counted. ``feature_dim`` is None without
    feature decoder, ``identity_dim`` without identity head; without both there is no teacher."""
    pixels = 3 * patch_size**2
    encode = 2.0 * num_visible * pixels * embed_dim
    student = transformer_flops(1 + num_visible, embed_dim, depth)
    decode = _decoder_flops(1 + num_visible, num_patches, embed_dim, pixel_dim, decoder_depth, pixels)
    teacher = 0.0
    if feature_dim is not None:
        decode += _decoder_flops(1 + num_visible, num_patches, embed_dim, feature_dim, decoder_depth, embed_dim)
    if identity_dim is not None:  # two embeddings, and a covariance of each
        decode += 2 * 2.0 * (embed_dim * identity_dim + 2 * identity_dim**2)
    if feature_dim is not None or identity_dim is not None:
        teacher = 2.0 * num_patches * pixels * embed_dim + transformer_flops(1 + num_patches, embed_dim, depth)
    return 3 * (student + decode) + 2 * encode + teacher  # nothing asks for the gradient of the patches


def _decoder_flops(num_tokens: int, num_patches: int, encoder_dim: int, dim: int, depth: int, out_dim: int) -> float:
    linear = 2.0 * num_tokens * encoder_dim * dim + 2.0 * num_patches * dim * out_dim
    return linear + transformer_flops(num_tokens + num_patches, dim, depth, num_out=num_patches)


# Dense bf16 operations a second, from the makers' data sheets; by the name that the driver gives, the longest match first.
_PEAK_FLOPS: Final = {
    "NVIDIA A100": 312e12,
    "NVIDIA A30": 165e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops(device_name: str, precision: str) -> float | None:
    """What a GPU can do at most, in operations a second; None where that is not known."""
    if precision != "bf16":
        return None
    known = [name for name in _PEAK_FLOPS if device_name == name or device_name.startswith((f"{name} ", f"{name}-"))]
    return _PEAK_FLOPS[max(known, key=len)] if known else None
