"""Running the programs as a user does: real processes, a real launcher, a small real data set."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import warm

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20
SETTINGS = [
    *("decoders.depth=2", "mask.block_ratio=null", "optim.lr=2.0e-3"),  # what the golden losses are of
    "train.global_batch_size=16",
    f"train.total_steps={STEPS}",
    "train.log_every=1",
    "train.precision=fp32",
    "data.shuffle_block_size=32",
    "data.num_threads=1",
]


def environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    """This process's environment, on the CPU, one thread a process, without a rank."""
    ours = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "COLUMNS": "300"}
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | ours | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | (extra or {})


def personmae(*args: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """``personmae ARGS``."""
    return warm.run(["-m", "personmae", *args], env=environment(env))


def launch(launcher: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
    """A launcher of the virtual environment: ``deepspeed ARGS`` or ``torchrun ARGS``."""
    command = [Path(sys.executable).parent / launcher, *args]
    return subprocess.run(
        [*map(str, command)], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=180, check=False
    )


def start_pretrain(shards: str | Path, run_dir: Path, *overrides: str, env: dict[str, str] | None = None) -> warm.Process:
    """``personmae pretrain`` in the background, output in ``run_dir``.log."""
    arguments = ["pretrain", "configs/quickstart.yaml", f"data.shards={shards}", f"run_dir={run_dir}", *SETTINGS, *overrides]
    with open(f"{run_dir}.log", "w") as log:
        return warm.start(["-m", "personmae", *arguments], env=environment(env), stdout=log, stderr=subprocess.STDOUT)


def pretrain(shards: str | Path, run_dir: Path, *overrides: str, env: dict[str, str] | None = None) -> None:
    """``personmae pretrain`` that must succeed."""
    code = start_pretrain(shards, run_dir, *overrides, env=env).wait(timeout=120)
    assert code == 0, Path(f"{run_dir}.log").read_text()


def losses(run_dir: Path) -> list[float]:
    """The loss of every logged step; all are finite."""
    found = [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert found
    assert all(map(math.isfinite, found)), found
    return found


def one_line_error(result: subprocess.CompletedProcess[str]) -> str:
    """The error line of a run that must have ended as a user's mistake: code 78, one line on stderr, no traceback."""
    assert result.returncode == 78, (result.returncode, result.stdout, result.stderr)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    return lines[0]
