"""Whether the fast path learns what the plain one does: 200 steps of each from the same start on the same batches.

    python benchmarks/curve.py runs/quickstart/shards                 # micro at 128x64, about 5 minutes on 2 cores
    python benchmarks/curve.py SHARDS --size small --img-size 256 128 --batch-size 256 --graphs      # a GPU

Three runs of ``personmae pretrain``: plain (eager, fp32), fast (compiled, bf16, with ``--graphs`` as CUDA graphs) and, for the
noise, plain from another seed. Writes ``benchmarks/results/curve.json`` with all losses, and how far each is from the first in
its second half, after each run what there is of it; a fast path that differs by more than a tenth of what the seed does is an
error.
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from personmae import dist
from personmae.bench.ceilings import require_native
from personmae.checkpoint import portable
from personmae.errors import run_program
from personmae.monitor import environment, run_log

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "curve.json"
PLAIN = ["train.precision=fp32", "train.compile=false"]
MOST_APART = 0.1  # of what another seed is


def losses(args: argparse.Namespace, run_dir: Path, *changes: str) -> list[float]:
    """The loss of every step of a run."""
    height, width = args.img_size
    settings = [
        f"data.shards={args.shards}",
        f"run_dir={run_dir}",
        f"model.size={args.size}",
        f"model.img_size=[{height},{width}]",
        f"regions.max_shift={height // 4}",
        f"train.global_batch_size={args.batch_size}",
        f"train.max_micro_batch_size={args.batch_size}",
        f"train.total_steps={args.steps}",
        "train.log_every=1",
        "engine.name=native",
        "checkpoint.every_steps=100000",
        "optim.lr=null",
    ]
    command = [sys.executable, "-m", "personmae", "pretrain", str(ROOT / "configs/quickstart.yaml"), *settings, *changes]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, encoding="utf-8")
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-4000:])
    return [record["loss"] for record in run_log.read_records(run_dir)]


def apart(one: list[float], other: list[float]) -> float:
    """Mean distance of two curves over their second half, as a share of the first's mean there."""
    half = len(one) // 2
    distance = statistics.fmean(abs(a - b) for a, b in zip(one[half:], other[half:], strict=True))
    return distance / statistics.fmean(one[half:])


def main() -> None:
    """Run all three and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--size", default="micro", choices=["micro", "small", "base"], help="(default micro)")
    parser.add_argument("--img-size", type=int, nargs=2, default=(128, 64), metavar=("H", "W"), help="(default 128 64)")
    parser.add_argument("--batch-size", type=int, default=64, help="(default 64)")
    parser.add_argument("--steps", type=int, default=200, help="(default 200)")
    parser.add_argument("--eager", action="store_true", help="the fast path in bf16 alone, not compiled")
    parser.add_argument("--graphs", action="store_true", help="the fast path as CUDA graphs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended before all runs were done"))  # and with it the run under way
    require_native(["bf16"], dist.read_world().device)
    args.shards = args.shards.resolve()
    fast = [f"train.compile={str(not args.eager).lower()}", f"train.cuda_graphs={str(args.graphs).lower()}"]
    ways = {"plain": PLAIN, "fast": ["train.precision=bf16", *fast], "plain, another seed": [*PLAIN, "seed=1"]}
    record: dict[str, Any] = {"commit": environment.git_commit(), "hardware": environment.describe_hardware()}
    settings = {name: str(value) for name, value in vars(args).items() if name not in ("shards", "out")}
    record |= {"versions": portable.versions(), "settings": settings}
    record |= {"ways": ways, "apart": {}, "last_loss": {}, "losses": {}}
    curves, distances = record["losses"], record["apart"]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, way in ways.items():
            curves[name] = losses(args, Path(folder) / name.split(",")[-1].strip(), *way)
            record["last_loss"][name] = curves[name][-1]
            if name != "plain":
                distances[name] = apart(curves["plain"], curves[name])
            args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            far = f"{100 * distances[name]:.3f} % from the plain path over the second half; " if name in distances else ""
            print(f"{name}: {far}last loss {curves[name][-1]:.4f}", flush=True)
    if distances["fast"] > MOST_APART * distances["plain, another seed"]:
        raise SystemExit("the fast path is further from the plain one than a tenth of what another seed is")


if __name__ == "__main__":
    raise SystemExit(run_program(main))
