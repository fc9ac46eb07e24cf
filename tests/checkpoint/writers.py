"""Writers for tests, the checkpoints that they are given, and what they have counted."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from personmae.checkpoint import portable
from personmae.checkpoint.portable import Checkpoint
from personmae.checkpoint.writer import Writer


def make(step: int) -> Checkpoint:
    return Checkpoint(step, {"student": {"w": torch.full((4,), float(step))}}, {"seed": 3, "nested": {"step": step}})


@contextmanager
def opened(run: Path, *, keep_last: int = 2, **options: Any) -> Iterator[Writer]:
    writer = Writer(run, keep_last=keep_last, **options)
    try:
        yield writer
    finally:
        writer.close()


def steps(run: Path) -> list[int]:
    return portable.local_steps(run)


def read_newest(run: Path) -> Checkpoint:
    path = portable.newest(run)
    assert path is not None
    return portable.read(path)


def sample(writer: Writer, name: str, **labels: str) -> float:
    return writer.counters.registry.get_sample_value(f"personmae_{name}", labels) or 0.0


def uploads(writer: Writer) -> float:
    """How many are uploaded by now."""
    return sample(writer, "checkpoint_duration_seconds_count", stage="upload")
