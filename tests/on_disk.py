"""A checkpoint on the disk, as a run's writer leaves one, without its thread."""

from pathlib import Path

from personmae.checkpoint import commit, portable
from personmae.checkpoint.host_copy import HostCopy
from personmae.checkpoint.portable import Checkpoint


def write_checkpoint(run_dir: str | Path, state: Checkpoint, *, keep_last: int) -> Path:
    """Copy, commit, and delete all but the ``keep_last`` newest up to this step; returns where it lies."""
    host_copy = HostCopy()
    host_copy.take(state.tensors)
    final = commit.commit(run_dir, state.step, host_copy, state.state)
    steps = [step for step in portable.local_steps(run_dir) if step <= state.step]
    commit.raise_first(commit.delete(run_dir, commit.surplus(steps, steps, keep_last=keep_last)))
    return final
