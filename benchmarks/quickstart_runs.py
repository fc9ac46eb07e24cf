"""What the benchmarks on the quickstart's recipe share: its verbs, what they leave behind, and the control like MAE."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MAE = ("mask.kind=random", "regions.max_shift=0", "loss.feature_weight=0")  # of a pre-training like MAE, of equal images
MODEL = ("--size", "micro", "--img-size", "128x64")  # the quickstart's, for random weights


def personmae(*arguments: object) -> None:
    """A verb in a process of its own; its output goes to the terminal, and where it fails, its exit code is ours."""
    done = subprocess.run([sys.executable, "-m", "personmae", *map(str, arguments)], cwd=ROOT, check=False)
    if done.returncode:  # it has said why
        raise SystemExit(done.returncode)


def read(folder: Path) -> dict[str, Any]:
    """The result that an evaluation or a training has left."""
    return json.loads((folder / "result.json").read_bytes())


def brief(record: dict[str, Any]) -> dict[str, float]:
    """mAP and Rank-1 in per cent, with two digits."""
    return {score: round(100 * record[score], 2) for score in ("mAP", "rank1")}
