"""The quickstart's claim over seeds: pre-trained against random weights, each with its own learning-rate sweep.

    python benchmarks/quickstart_seeds.py            # about half an hour on 2 idle CPU cores; resumable

Writes ``benchmarks/results/quickstart_seeds.json``. Each seed pre-trains, and then fine-tunes both starts at every learning
rate. The quickstart's own data (seed 0) is used throughout, so the spread is that of training.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / "seeds"
RESULTS = ROOT / "benchmarks" / "results" / "quickstart_seeds.json"
SEEDS = (0, 1, 2)
BASELINES = ("histogram", "thumbnail", "thumbnail+histogram")
LEARNING_RATES = ("5e-4", "1e-3", "2e-3")


def personmae(*args: str | Path) -> None:
    """Run a verb; its output goes to the terminal."""
    subprocess.run([sys.executable, "-m", "personmae", *map(str, args)], cwd=ROOT, check=True)


def finetune(start: str, seed: int, lr: str) -> dict:
    """Fine-tune one start and return its result record."""
    run_dir = RUNS / f"{start}_seed{seed}_lr{lr}"
    init = "random" if start == "random" else RUNS / f"pretrain_seed{seed}"
    personmae(
        "finetune",
        f"configs/quickstart_{start}.yaml",
        f"run_dir={run_dir}",
        f"root={RUNS / 'data' / 'market1501'}",
        f"init={init}",
        f"seed={seed}",
        f"optim.lr={lr}",
    )
    return json.loads((run_dir / "result.json").read_text(encoding="utf-8"))


def main() -> None:
    """Make the data, train everything that is not there yet, and write the summary."""
    personmae("synth", RUNS / "data")
    personmae("shards", "write", RUNS / "data" / "pool", RUNS / "shards", "--shard-mb", "8", "--if-missing")
    for name in BASELINES:
        personmae("evaluate", name, "market1501", RUNS / "data" / "market1501", "--out", RUNS / name)
    runs = []
    for seed in SEEDS:
        run_dir = RUNS / f"pretrain_seed{seed}"
        personmae("pretrain", "configs/quickstart.yaml", f"run_dir={run_dir}", f"data.shards={RUNS / 'shards'}", f"seed={seed}")
        for lr in LEARNING_RATES:
            for start in ("random", "personmae"):
                record = finetune(start, seed, lr)
                runs.append(
                    {"start": start, "seed": seed, "lr": lr} | {k: record[k] for k in ("mAP", "rank1", "rank5", "mINP")}
                )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(summarise(runs), indent=1) + "\n", encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))


def summarise(runs: list[dict]) -> dict:
    """Mean and spread by start and learning rate, and the best rate of each start."""
    run = json.loads((RUNS / "pretrain_seed0" / "run.json").read_text(encoding="utf-8"))
    summary: dict = {"commit": run["commit"], "hardware": run["hardware"], "versions": run["versions"]}
    summary |= {name: json.loads((RUNS / name / "result.json").read_text(encoding="utf-8"))["mAP"] for name in BASELINES}
    for start in ("random", "personmae"):
        by_lr = {lr: [r["mAP"] for r in runs if r["start"] == start and r["lr"] == lr] for lr in LEARNING_RATES}
        best = max(by_lr, key=lambda lr: statistics.mean(by_lr[lr]))
        spread = {lr: {"mean": statistics.mean(v), "min": min(v), "max": max(v)} for lr, v in by_lr.items()}
        summary[start] = {"best_lr": best, "mAP_by_lr": spread}
    return summary | {"runs": runs}


if __name__ == "__main__":
    main()
